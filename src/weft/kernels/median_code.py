"""The code of conditional medians: 2^b levels for standard normal numbers, each the median of its bin, which makes the
absolute error least (Jie, Wang and Deng, 2023, arXiv 2307.16867, section 3.2).

    thresholds t = midpoints of the levels v;   v = Phi^-1(mean of Phi at the two thresholds around);   500 rounds
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from weft.kernels.straight_through import straight_through
from weft.tables import table

__all__ = ["BITS", "code_levels", "fake_quantise", "level_table", "normalised", "to_codes"]

BITS = (1, 2, 4, 8)
_ROUNDS = 500
_SMALL = 1e-5


@cache
def code_levels(bits: int) -> tuple[float, ...]:
    """v (2^b), rising, symmetric about zero. Started at 0; 500 rounds are not yet the fixed point at 8 bits, but are
    what is published.
    """
    normal = NormalDist()
    values = [0.0] * 2**bits
    for _ in range(_ROUNDS):
        edges = [0.0, *(normal.cdf((a + b) / 2) for a, b in pairwise(values)), 1.0]
        values = [normal.inv_cdf((a + b) / 2) for a, b in pairwise(edges)]
    return tuple((up - down) / 2 for up, down in zip(values, reversed(values), strict=True))  # symmetric to the bit


level_table = table(tuple)
"""Levels as a tensor."""


def normalised(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u = (w - mean) / (deviation + 1e-5), the mean and the deviation of all of w."""
    mean, deviation = w.mean(), w.std()
    return (w - mean) / (deviation + _SMALL), mean, deviation


def to_codes(u: Tensor, levels: Sequence[float]) -> Tensor:
    """The nearest level of each number, int64; a tie goes to the lower one."""
    values = level_table(tuple(levels), device=u.device, dtype=u.dtype)
    return torch.bucketize(u, (values[1:] + values[:-1]) / 2)


def fake_quantise(w: Tensor, levels: Sequence[float]) -> Tensor:
    """v[code] * deviation + mean; the gradient passes the quantiser as if it were not there, and the mean and the
    deviation as they are.
    """
    u, mean, deviation = normalised(w)
    quantised = level_table(tuple(levels), device=u.device, dtype=u.dtype)[to_codes(u.detach(), levels)]
    return straight_through(quantised, u) * deviation + mean
