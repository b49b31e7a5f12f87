"""Weight signatures: what one fine-tuning learned that another did not (RWS: Robust Weight Signatures, 2023, arXiv
2302.12480).

    S = d_c - (<d_c, d_s> / <d_s, d_s>) d_s        per tensor, flattened

for d_c = theta_c - theta_0 (changed: trained on the corruption, the skill, ...) and d_s = theta_s - theta_0 (clean: the
plain fine-tuning of the same start), in all blocks or the first ones (`blocks`). theta_s + w S has it, w = -1 takes it
away again. For low-rank deltas S is one of rank r_c + r_s, and the products need no out x in matrix.
Deviations: two dot products instead of the projection matrix; the weight w is applied once (the official code applies
it twice, so that strength is not linear in it). Of the published maps of w (linear, logarithmic, tanh) the linear one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weft.merging.base import Merger, Pair

__all__ = ["MERGER", "Code", "block_of", "decode", "encode", "factored_orthogonal_part", "orthogonal_part"]


class Code(NamedTuple):
    """A tensor T = step * codes; `codes` are integers of at most 8 bits, or T itself where step is 1 and it is fp32."""

    codes: Tensor
    step: float


def orthogonal_part(changed: Tensor, clean: Tensor) -> Tensor:
    """The part of `changed` that is orthogonal to `clean`, of one shape, in fp32; all of it where `clean` is zero."""
    c, s = changed.flatten().double(), clean.flatten().double()
    square = torch.dot(s, s)
    share = torch.dot(c, s) / square if square > 0 else square
    return (c - share * s).view(changed.shape).float()


def factored_orthogonal_part(changed: Pair, clean: Pair) -> Pair:
    """The same of two products B A: the factors of the orthogonal part, [B_c, -share B_s] and [A_c; A_s]."""
    (B_c, A_c), (B_s, A_s) = changed, clean
    if not len(A_c):  # nothing was learned here
        return changed
    square = _inner(clean, clean)
    share = _inner(changed, clean) / square if square > 0 else square
    return torch.cat([B_c, -share * B_s], dim=1), torch.cat([A_c, A_s])


def signature(pairs: Sequence[Pair], rank: int, generator: torch.Generator) -> Pair:
    """The orthogonal part of the first of two deltas, the changed one, to the second, the clean one; `rank` has no
    say.
    """
    changed, clean = pairs
    return factored_orthogonal_part(changed, clean)


def _inner(one: Pair, other: Pair) -> Tensor:
    """<B_1 A_1, B_2 A_2> = sum of (B_1^T B_2) * (A_1 A_2^T)."""
    return ((one[0].mT @ other[0]) * (one[1] @ other[1].mT)).sum()


def encode(tensor: Tensor, bits: int | None = 8) -> Code:
    """Linear codes with a step of max |T| / (2^(bits - 1) - 1), so off by half a step at most; None keeps fp32."""
    tensor = tensor.float()
    if bits is None:
        return Code(tensor, 1.0)
    step = float(tensor.abs().max()) / (2 ** (bits - 1) - 1) if tensor.numel() else 0.0
    return Code((tensor / (step or 1.0)).round().to(torch.int8), step)


def decode(code: Code) -> Tensor:
    """T in fp32."""
    return code.codes.float() * code.step


def block_of(name: str) -> int | None:
    """The number of the block that a tensor lies in: 3 for model.layers.3.mlp.up_proj.weight; None outside of all."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return None if found is None else int(found[1])


MERGER = Merger(
    name="rws",
    summary="what the first adapter learned and the second did not: the part of its delta orthogonal to the other's",
    paper="Cai et al., 2023, arXiv 2302.12480",
    merge=signature,
    takes=2,
)
