"""Codebooks: the numbers that the codes of a matrix stand for, found by k-means on a line, and scales for them.

    least  sum_j w_j (x_j - c_k(j))^2,   k(j) the codeword nearest to x_j

Lloyd's steps from the weighted quantiles of the numbers, many sets of numbers at a time; codewords stay sorted. Numbers
are sorted once: what a codeword has is then a range, and its mean the difference of two sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["codebooks", "fit_scales", "kmeans", "nearest"]

_STEPS = 300  # a large codebook moves slowly
_NORM = 2.4  # as for grids of integers (`weft.kernels.integer_grid`)
_CELLS = 2048  # of a unit: far finer than 32 levels
_RANGES = tuple(1.2 - i / 20 for i in range(15))


def nearest(numbers: Tensor, books: Tensor) -> Tensor:
    """The codes (sets, n) of numbers (sets, n) in sorted codebooks (sets, K); halves go to the larger codeword."""
    middles = (books[:, 1:] + books[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), numbers.contiguous(), right=True)


def kmeans(numbers: Tensor, weights: Tensor, count: int) -> Tensor:
    """The codebooks (sets, count), sorted, of numbers (sets, n) with weights (sets, n) from 0 on."""
    return next(codebooks(numbers, weights, [count]))


def codebooks(numbers: Tensor, weights: Tensor, counts: Iterable[int]) -> Iterator[Tensor]:
    """Those of several counts, for which numbers are sorted once."""
    ordered, places = numbers.sort(dim=1)
    mass = weights.expand_as(numbers).gather(1, places).double()
    mass, first = (F.pad(t.cumsum(1), (1, 0)) for t in (mass, mass * ordered))
    for count in counts:
        marks = (torch.arange(count, device=numbers.device, dtype=mass.dtype) + 0.5) / count
        at = torch.searchsorted(mass[:, 1:].contiguous(), (mass[:, -1:] * marks).contiguous())
        yield _lloyd(ordered, mass, first, ordered.gather(1, at.clamp(max=numbers.shape[1] - 1)))


def _lloyd(ordered: Tensor, mass: Tensor, first: Tensor, books: Tensor) -> Tensor:
    """Codebooks (sets, count) after Lloyd's steps; `mass` and `first` (sets, n + 1) are sums of weights and of numbers
    by weight.
    """
    for _ in range(_STEPS):
        middles = (books[:, 1:] + books[:, :-1]) / 2
        edges = F.pad(torch.searchsorted(ordered, middles.contiguous()), (1, 0))
        edges = F.pad(edges, (0, 1), value=ordered.shape[1])
        total, sums = (t.gather(1, edges).diff() for t in (mass, first))
        means = (sums / torch.where(total > 0, total, 1.0)).to(books.dtype)
        before, books = books, torch.where(total > 0, means, books)
        if torch.equal(before, books):
            break
    return books.sort(dim=1).values


def fit_scales(numbers: Tensor, book: Tensor, *, clip: bool = False, scale_dtype: torch.dtype | None = None) -> Tensor:
    """The scale (..., 1) of each group of `numbers` (..., n), whose largest is then 1, for a sorted codebook (K,).

    Args:
        clip: search each group's scale for the least sum |w - w'|^2.4, from 1.2 to 0.5 times that one. Zeros do not
            count: they fill up short groups, or stand where no input ever comes.
        scale_dtype: that scales are rounded to.
    """
    largest = numbers.abs().amax(-1, keepdim=True)
    best, least = _stored(largest, scale_dtype), torch.full_like(largest, torch.inf)
    counted, losses = numbers != 0, _losses(book.to(numbers))
    for share in _RANGES if clip else ():
        scale = _stored(largest * share, scale_dtype)
        usable = (scale > 0) & scale.isfinite()
        cells = (numbers * (_CELLS / torch.where(usable, scale, torch.inf))).add_(2 * _CELLS + 0.5)
        found = losses.index_select(0, cells.clamp_(0, len(losses) - 1).int().flatten()).view_as(numbers)
        lost = found.mul_(counted).sum(-1, keepdim=True).mul_(scale.pow(_NORM))
        lost = torch.where(usable, lost, torch.inf)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def _losses(book: Tensor) -> Tensor:
    """|u - u'|^2.4 of numbers u from -2 to 2, `_CELLS` a unit: looked up sooner than each number's code is found."""
    units = torch.arange(-2 * _CELLS, 2 * _CELLS + 1, device=book.device, dtype=book.dtype) / _CELLS
    return (units - book[nearest(units.unsqueeze(0), book.unsqueeze(0))[0]]).abs().pow(_NORM)


def _stored(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    return scale if dtype is None else scale.to(dtype).to(scale.dtype)
