"""sparsegpt: weights are pruned column after column, and the columns to come take up the error (Frantar and Alistarh,
2023, arXiv 2301.00774).

    the walk of `weft.linalg.column_errors`;   of each block of 128 columns, when it is reached, the share d of entries
    with the largest w^2 / U_jj^2 stays, over all rows together;   with `pattern` n:m, n of every m inputs of each row

A size is the density d, as for `wanda`. x are the inputs in the model pruned so far, within a block too.
Deviations: exactly the share d of a block stays (the code prunes one entry more). Inputs are measured anew for
each group of layers within a block, where the code takes those of a whole block in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.linalg.column_errors import Columns, columns, settle
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter, low_rank_terms
from weft.methods.wanda import DENSITIES, largest, parsed_pattern, pruned_sizes
from weft.terms import Masked

__all__ = ["METHOD", "prune", "sizes"]

_BLOCK = 128


def prune(W: Tensor, how: Columns, density: float, pattern: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """W' and the mask of what stays, (out, in) both."""
    rest, U = how.begin(W), how.root.to(W.dtype)
    mask, spread = torch.zeros_like(rest, dtype=torch.bool), U.diagonal().unsqueeze(1)
    answer = torch.empty_like(rest)

    def settled(j: int) -> Tensor:
        step = pattern[1] if pattern else _BLOCK
        if j % step == 0:
            scores = (rest[j : j + step] / spread[j : j + step]).square()
            if pattern:
                mask[j : j + step] = largest(scores.mT, pattern[0]).mT
            else:
                mask[j : j + step] = largest(scores.flatten(), _kept(scores.numel(), density)).view(scores.shape)
        answer[j] = rest[j] * mask[j]
        return answer[j]

    whole = max(_BLOCK // pattern[1], 1) * pattern[1] if pattern else _BLOCK
    starts = range(0, len(rest), whole)
    settle(rest, U, [(start, min(start + whole, len(rest))) for start in starts], settled)
    return how.back(answer), how.back(mask)


def _kept(count: int, density: float) -> int:
    return round(density * count)


class _SparseGPT(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The kept entries at each density: H is factorised once."""
        W = site.weight()
        how = columns(site.moments["input_moment"].to(W.device), damping=options["damping"])
        for density in sizes:
            made, mask = prune(W, how, density, parsed_pattern(options["pattern"]))
            yield density, Split({"base": Masked.from_mask(made.to(site.dtype), mask)})


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[float, int]]:
    """(density, bytes): every twentieth."""
    out, inn = shape
    widths = [min(_BLOCK, inn - start) for start in range(0, inn, _BLOCK)]
    return pruned_sizes(shape, options, {d: sum(_kept(out * width, d) for width in widths) for d in DENSITIES})


METHOD = Method(
    name="sparsegpt",
    kind="compress",
    summary="Weights pruned column after column, each one's error taken up by the columns after it.",
    paper="Frantar and Alistarh, 2023, arXiv 2301.00774",
    needs=("input_moment",),
    allocate="equal",
    sequential=True,
    split=_SparseGPT(),
    sizes=sizes,
    trained=low_rank_terms,
    defaults={"pattern": "unstructured", "damping": 0.01},
)
