"""tiny-training: the codes of a quantised model trained as they are, a few input channels of the last blocks, by plain
steps that are right at every scale (Lin et al., 2022, arXiv 2206.15472; its code mit-han-lab/tiny-training).

    W = s (V - zero),   V in codes:   dL/dV = s dL/dW;   scaled, V <- V - rate (dL/dV) / s^2, a step of W
    weights of `share` of the inputs of each matrix, those of the largest norm, in the last `blocks` blocks alone

and the vectors (biases, norms) of these blocks, by the run's optimizer. A gradient of weights needs the inputs that
it is of, and no others are kept; nothing is before the last blocks. What is left is as large as it was: same scales,
other codes. `weft finetune DIR --method tiny-training --data TEXT` on any model in integer codes; published on 8
bits; of fewer bits a rate of 0.1 changes few codes, and a run that changes next to none says so. Training holds V in
fp32, share of the matrices of these blocks.
Deviations: V keeps fractions between steps and rounds in every pass, where whole numbers alone would lose small
steps; biases are real numbers here. The blocks and the share are given: the paper finds them by an evolutionary
search over measured gains of single layers, under a limit of memory. All matrices of a block have one share.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split
from weft.rules.scaled_steps import ScaledSteps
from weft.terms import IntegerCode, SteppedCode
from weft.terms.layers import block_stacks

__all__ = ["METHOD", "finish", "last_blocks", "split", "trained"]


def last_blocks(
    shapes: Mapping[str, tuple[int, int]], rank: Any, generator: torch.Generator, options: Mapping[str, Any]
) -> set[str]:
    """The names of the layers in the last blocks.

    Raises:
        WeftError: no block, or no share of inputs, is asked for.
    """
    blocks, share = options["blocks"], options["share"]
    if blocks < 1 or not 0 < share <= 1:
        raise WeftError(f"blocks is {blocks} and share {share}: give at least 1 block, and a share above 0, at most 1.")
    block_of = {name: _block(name) for name in shapes}
    last = list(dict.fromkeys(block for block in block_of.values() if block))[-blocks:]
    return {name for name, block in block_of.items() if block in last}


def _block(name: str) -> str:
    """Up to the first number in a layer's name; "" where there is none."""
    parts = name.split(".")
    before = list(takewhile(lambda part: not part.isdigit(), parts))
    return ".".join(parts[: len(before) + 1]) if len(before) < len(parts) else ""


def split(site: Site, *, share: float) -> Split:
    """Integer codes of the last blocks, some columns of them trained; other layers stay."""
    coded = {key: term for key, term in site.terms.items() if isinstance(term, IntegerCode)}
    if not coded or site.name not in site.shared:
        return Split()
    made = {}
    for key, code in coded.items():
        norms = code.dense(torch.float32).norm(dim=0)
        made[key] = SteppedCode.from_code(code, norms.topk(max(1, round(share * len(norms)))).indices)
    return Split({**site.terms, **made})


def finish(site: Site) -> Split:
    """The codes that are left."""
    return Split({key: term.finished() for key, term in site.terms.items()})


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The stepped codes, and the vectors of the blocks that hold any."""
    codes = [m.V for m in model.modules() if type(m) is SteppedCode]
    blocks = [block for stack in block_stacks(model).values() for block in stack]
    held = [block for block in blocks if any(type(m) is SteppedCode for m in block.modules())]
    return [*codes, *(p for block in held for p in block.parameters() if p.dim() == 1)]


METHOD = Method(
    name="tiny-training",
    kind="train",
    summary="Codes of some input channels of the last blocks, trained by plain steps that know their scale.",
    paper="Lin et al., 2022, arXiv 2206.15472",
    split=split,
    share=last_blocks,
    finish=finish,
    ranked=False,
    rules=(ScaledSteps,),
    trained=trained,
    defaults={"blocks": 2, "share": 0.25, "rate": 0.1},
)
