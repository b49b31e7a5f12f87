"""Block influence: how much a block changes what passes through it, s = 1 - E[cos(x, y)] over the tokens (Men et al.,
2024, arXiv 2403.03853).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.stats.cache import accumulate, fingerprint
from weft.stats.calibrate import Batch, forward_inputs, frozen, to_device
from weft.stats.streams import Streams
from weft.terms.layers import block_stacks

__all__ = ["block_influence"]


@torch.no_grad()
def block_influence(model: nn.Module, batches: Sequence[Batch], *, cache: Path | None = None) -> dict[str, float]:
    """Block -> 1 - the mean cosine of what goes in and what comes out, over the tokens that the masks keep.

    `cache` is a directory, from which an interrupted pass goes on. Raises WeftError where the influence is no number.
    """
    sums, streams = dict[str, Tensor](), Streams()

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            cosine = F.cosine_similarity(x.float(), y.float(), dim=-1).double()
            keep = streams.now.keep(x)
            cosine = cosine if keep is None else cosine[keep]
            found = torch.stack([cosine.sum(), cosine.new_tensor(cosine.numel())])
            sums[name] = found + sums[name].to(found.device) if name in sums else found

        return after

    def add(batch: Batch) -> None:
        streams.begin(to_device(batch, model))
        model(**forward_inputs(model, to_device(batch, model)))

    blocks = dict(_blocks(model))
    path = None if cache is None else cache / f"influence-{fingerprint(model, batches, (), blocks)}"
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(streams.following(model))
        for name, block in blocks.items():
            stack.callback(block.register_forward_hook(hook(name), with_kwargs=True).remove)
        accumulate(batches, add, sums, path)
    found = {name: 1 - float(sums[name][0] / sums[name][1]) for name in blocks if name in sums}
    for name, s in found.items():
        if not isfinite(s):
            raise WeftError(f"The outputs of {name} hold NaN or infinity; load the model in float32, or repair it.")
    return found


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, stack in block_stacks(model).items():
        yield from ((f"{path}.{i}", block) for i, block in enumerate(stack))
