"""Grids of integers: w ~ (code - zero) * scale, code and zero from 0 to 2^b - 1, one scale (and zero) a group.

    asymmetric:  [low, high] = [min(w, 0), max(w, 0)];   scale = (high - low) / (2^b - 1),   zero = round(-low / scale)
    symmetric:   scale = 2 max|w| / (2^b - 1),   zero = 2^(b - 1)

as in Frantar et al., 2022 (arXiv 2210.17323) and its code. With `clip`, each group takes the grid that makes
sum |w - w'|^2.4 least among 80 ranges, shrunk by 0, 1, ... 79 hundredths (the same code's search).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Grid", "fit", "grouped", "learned", "of_range", "to_codes", "ungrouped"]

_SHRINKS = [1 - i / 100 for i in range(80)]
_NORM = 2.4


class Grid(NamedTuple):
    """Of groups of numbers: scales (..., 1), as they are stored, and whole-number zeros (..., 1), in one dtype."""

    scale: Tensor
    zero: Tensor
    bits: int

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
    return (torch.round(numbers / safe) + grid.zero).clamp_(0, 2**grid.bits - 1)


def fit(
    numbers: Tensor, bits: int, *, symmetric: bool = False, clip: bool = False, scale_dtype: torch.dtype | None = None
) -> Grid:
    """The grid of each group of `numbers` (..., group), whose scales are rounded to `scale_dtype`.

    Raises:
        OverflowError: a scale is beyond the largest number of `scale_dtype`.
    """
    low, high = numbers.amin(-1, keepdim=True).clamp(max=0), numbers.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    grid = of_range(low, high, bits, symmetric, scale_dtype)
    return _shrunk(numbers, grid, low, high, symmetric, scale_dtype) if clip else grid


def of_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool = False, scale_dtype: torch.dtype | None = None
) -> Grid:
    """The grid from low to high, in which zero lies; scales are rounded to `scale_dtype` (None: not at all).

    Raises:
        OverflowError: a scale is beyond the largest number of `scale_dtype`.
    """
    last = 2**bits - 1
    scale = (high - low) / last
    stored = scale.to(scale_dtype or scale.dtype).to(scale.dtype)
    if scale_dtype is not None and torch.isinf(stored).any():
        raise OverflowError(f"a scale of {float(scale.max()):.3g} is beyond {scale_dtype}")
    if symmetric:
        return Grid(stored, torch.full_like(stored, 2 ** (bits - 1)), bits)
    safe = torch.where(stored > 0, stored, 1.0)
    return Grid(stored, torch.round(-low / safe).clamp_(0, last), bits)


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
    return x + (f(x) - x).detach()


def _shrunk(
    numbers: Tensor, grid: Grid, low: Tensor, high: Tensor, symmetric: bool, scale_dtype: torch.dtype | None
) -> Grid:
    scale, zero = grid.scale.clone(), grid.zero.clone()
    least, extreme = torch.full_like(scale, torch.inf), torch.maximum(high, -low)
    for shrink in _SHRINKS:
        tried = of_range(shrink * low, shrink * high, grid.bits, symmetric, scale_dtype)
        beyond = ((1 - shrink) * extreme - tried.scale).clamp(min=0).pow(_NORM)  # what the largest number alone loses
        if not numbers.is_cuda and bool((beyond >= least).all()):  # and loses more at every smaller range
            break
        error = (tried.values(to_codes(numbers, tried)) - numbers).abs_().pow_(_NORM).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried.scale, scale), torch.where(better, tried.zero, zero)
    return Grid(scale, zero, grid.bits)
