"""Codebooks: the numbers that the codes of a matrix stand for, found by k-means on a line.

    least  sum_j w_j (x_j - c_k(j))^2,   k(j) the codeword nearest to x_j

Lloyd's steps from the weighted quantiles of the numbers, many sets of numbers at a time; codewords stay sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kmeans", "nearest"]

_STEPS = 30


def nearest(numbers: Tensor, books: Tensor) -> Tensor:
    """The codes (sets, n) of numbers (sets, n) in sorted codebooks (sets, K); halves go to the larger codeword."""
    middles = (books[:, 1:] + books[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), numbers.contiguous(), right=True)


def kmeans(numbers: Tensor, weights: Tensor, count: int) -> Tensor:
    """The codebooks (sets, count), sorted, of numbers (sets, n) with weights (sets, n) from 0 on."""
    weights = weights.expand_as(numbers)
    ordered, places = numbers.sort(dim=1)
    mass = weights.gather(1, places).cumsum(1)
    marks = (torch.arange(count, device=numbers.device, dtype=numbers.dtype) + 0.5) / count
    at = torch.searchsorted(mass, (mass[:, -1:] * marks).contiguous()).clamp(max=numbers.shape[1] - 1)
    books = ordered.gather(1, at)
    for _ in range(_STEPS):
        codes = nearest(numbers, books)
        total = torch.zeros_like(books).scatter_add_(1, codes, weights)
        first = torch.zeros_like(books).scatter_add_(1, codes, weights * numbers)
        books = torch.where(total > 0, first / torch.where(total > 0, total, 1.0), books)
    return books.sort(dim=1).values
