"""Grids of integers: w ~ (code - zero) * scale, code and zero from 0 to 2^b - 1, one scale (and zero) a group.

    asymmetric:  [low, high] = [min(w, 0), max(w, 0)];   scale = (high - low) / (2^b - 1),   zero = round(-low / scale)
    symmetric:   scale = 2 max|w| / (2^b - 1),   zero = 2^(b - 1)

as in Frantar et al., 2022 (arXiv 2210.17323) and its code. With `clip`, each group takes the grid that makes
sum |w - w'|^2.4 least among 80 ranges, shrunk by 0, 1, ... 79 hundredths (the same code's search). Where the largest
number alone loses more than the best range so far, a smaller range is not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.straight_through import straight_through
from weft.tables import table

__all__ = ["Grid", "checked", "fit", "grouped", "learned", "of_range", "to_codes", "ungrouped"]

_NORM = 2.4
_ROUNDS = (0, 3, 7, 15, 31, 55, 80)
"""Ranges that are tried together; after each round the groups that are done are left out."""
_AT_ONCE = 2**22  # numbers: of more, groups are tried one part after another


@table
def _shrinks() -> list[float]:
    return [1 - i / 100 for i in range(_ROUNDS[-1])]


class Grid(NamedTuple):
    """Of groups of numbers: scales (..., 1), as they are stored, and whole-number zeros (..., 1), in one dtype."""

    scale: Tensor
    zero: Tensor
    bits: int | Tensor  # a width, or of each group its own: int64, as `scale`

    def values(self, codes: Tensor) -> Tensor:
        """The numbers (..., group) of codes."""
        return (codes - self.zero) * self.scale


def grouped(matrix: Tensor, group: int) -> Tensor:
    """(out, in) -> (out, groups, group); a short last group is filled with zeros, which lie on every grid."""
    short = -matrix.shape[1] % group
    return (F.pad(matrix, (0, short)) if short else matrix).reshape(len(matrix), -1, group)


def ungrouped(groups: Tensor, in_features: int) -> Tensor:
    """The inverse of `grouped`."""
    return groups.flatten(1)[:, :in_features]


def to_codes(numbers: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of numbers (..., group), whole numbers in their dtype; halves go to the even one."""
    safe = torch.where(grid.scale > 0, grid.scale, 1.0)  # a group of zeros has scale 0
    return (torch.round(numbers / safe) + grid.zero).clamp_(min=0).clamp_(max=2**grid.bits - 1)  # type: ignore[arg-type]


def fit(
    numbers: Tensor,
    bits: int | Tensor,
    *,
    symmetric: bool = False,
    clip: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> Grid:
    """The grid of each group of `numbers` (..., group), whose scales are rounded to `scale_dtype`, which may make them
    infinite: see `checked`. `bits` is a width, or int64 (..., 1), one a group.
    """
    low, high = numbers.amin(-1, keepdim=True).clamp(max=0), numbers.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if clip:
        return _clipped(numbers, low, high, bits, symmetric, scale_dtype)
    return of_range(low, high, bits, symmetric, scale_dtype)


def checked(grid: Grid, scale_dtype: torch.dtype | None) -> Grid:
    """The grid; where it lies on a GPU, this waits for it.

    Raises:
        OverflowError: a scale is beyond the largest number of `scale_dtype`.
    """
    if scale_dtype is not None and torch.isinf(grid.scale).any():
        raise OverflowError(f"a scale is beyond {scale_dtype}, whose largest number is {torch.finfo(scale_dtype).max}")
    return grid


def of_range(
    low: Tensor, high: Tensor, bits: int | Tensor, symmetric: bool = False, scale_dtype: torch.dtype | None = None
) -> Grid:
    """The grid from low to high, in which zero lies; scales are rounded to `scale_dtype` (None: not at all)."""
    last = 2**bits - 1
    scale = (high - low) / last
    stored = scale if scale_dtype is None else scale.to(scale_dtype).to(scale.dtype)
    if symmetric:
        return Grid(stored, torch.zeros_like(stored) + 2 ** (bits - 1), bits)
    safe = torch.where(stored > 0, stored, 1.0)
    return Grid(stored, torch.round(-low / safe).clamp_(min=0).clamp_(max=last), bits)  # type: ignore[arg-type]


def learned(
    numbers: Tensor, ends: Tensor, bits: int, scale_dtype: torch.dtype, offsets: Tensor | float = 0.0
) -> tuple[Tensor, Grid]:
    """The codes (..., group) and grids of `numbers` on shares of their ranges, differentiable: rounding counts as the
    identity, for numbers, ends and offsets alike.

    Args:
        ends: (2, ..., 1), shares of the least and of the largest number, from 0 to 1.
        scale_dtype: that scales are rounded to.
        offsets: added to numbers / scale before they are rounded.
    """
    last = 2**bits - 1
    low = numbers.amin(-1, keepdim=True).clamp(max=0) * ends[0]
    high = numbers.amax(-1, keepdim=True).clamp(min=0) * ends[1]
    scale = _through((high - low) / last, lambda s: s.to(scale_dtype).to(s.dtype))
    safe = torch.where(scale > 0, scale, 1.0)
    zero = _through(-low / safe, lambda z: z.round().clamp(0, last))
    codes = (_through(numbers / safe + offsets, torch.round) + zero).clamp(0, last)
    return codes, Grid(scale, zero, bits)


def _through(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f(x), with the gradient of x."""
    return straight_through(f(x.detach()), x)


def _clipped(
    numbers: Tensor, low: Tensor, high: Tensor, bits: int | Tensor, symmetric: bool, scale_dtype: torch.dtype | None
) -> Grid:
    """The grids of least loss, of ranges low to high (..., 1)."""
    shrinks = _shrinks(device=numbers.device, dtype=numbers.dtype)
    shape, numbers, low, high = low.shape, numbers.flatten(0, -2), low.reshape(-1, 1), high.reshape(-1, 1)
    widths = bits.expand(shape).reshape(-1, 1) if isinstance(bits, Tensor) else bits

    def ranges(rows: Tensor, tried: Tensor) -> Grid:
        width = widths[rows] if isinstance(widths, Tensor) else widths
        return of_range(tried * low[rows], tried * high[rows], width, symmetric, scale_dtype)

    rows = torch.arange(len(low), device=low.device)
    scale, zero, _ = ranges(rows, shrinks[:1])
    least = torch.full_like(scale, torch.inf)
    for first, end in pairwise(_ROUNDS):
        grid = ranges(rows, shrinks[first:end])
        error, at = _lost(numbers[rows], grid).min(1, keepdim=True)
        better = error < least[rows]
        for best, new in ((least, error), (scale, grid.scale.gather(1, at)), (zero, grid.zero.gather(1, at))):
            best[rows] = torch.where(better, new, best[rows])
        if end < len(shrinks):
            largest = torch.maximum(high, -low)[rows]
            beyond = (1 - shrinks[end]) * largest - ranges(rows, shrinks[end : end + 1]).scale
            rows = rows[(beyond.clamp(min=0).pow(_NORM) < least[rows]).squeeze(1)]
        if not len(rows):
            break
    return Grid(scale.view(shape), zero.view(shape), bits)


def _lost(numbers: Tensor, grid: Grid) -> Tensor:
    """sum |w - w'|^2.4 (n, ranges) of groups (n, group) on grids (n, ranges); infinite where a scale is."""
    scale, found = grid.scale.unsqueeze(2), []
    divisor, least, most = torch.where(scale > 0, scale, 1.0), -grid.zero, 2**grid.bits - 1 - grid.zero
    all = numbers.unsqueeze(1), divisor, least.unsqueeze(2), most.unsqueeze(2), scale
    count = max(1, _AT_ONCE // (scale.shape[1] * numbers.shape[1]))
    for w, by, low, high, step in zip(*(torch.split(t, count) for t in all), strict=True):
        off = (w / by).round_().clamp_(low, high).mul_(step).sub_(w).abs_()
        found.append(off.log2_().mul_(_NORM).exp2_().sum(2))  # a third of the time of a power
    return torch.cat(found).nan_to_num_(torch.inf, torch.inf)
