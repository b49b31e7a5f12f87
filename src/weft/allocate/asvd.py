"""asvd: sensitivity-based truncation rank search (Yuan et al., 2023, arXiv 2312.05821, section 3.3).

Each layer alone is truncated to each share of a grid, and the calibration loss measured; the budget is then met by one
cut on that loss common to all layers: a layer takes its smallest share whose loss, and that of every larger share, lies
at or below the cut.

The published grid is 0.4 to 0.9; smaller shares, down to the smallest rank, are measured only when the budget cannot be
met without them. Costs a forward pass over all the calibration text a layer and share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from weft.allocate.base import LayerInfo, Ranks, check_reach, dense_or, total_spend

__all__ = ["READS", "allocate"]

READS = ("spectrum", "measure")

_PUBLISHED = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_SMALLER = (0.3, 0.2, 0.1, 0.0)


def allocate(
    layers: Mapping[str, LayerInfo],
    budget: int,
    *,
    measure: Callable[[str, Sequence[int]], Sequence[float]],
    multiple: int = 1,
) -> Ranks:
    """The cut of least loss that fits the budget.

    Args:
        measure: (layer, ranks) -> calibration losses with only that layer truncated to each of them.

    Raises:
        WeftError: the smallest shares of the grid exceed the budget.
    """
    check_reach(layers, budget, multiple)
    smallest = {name: _rank(layer, _PUBLISHED[-1], multiple) for name, layer in layers.items()}
    shares = _PUBLISHED if total_spend(layers, smallest) <= budget else _PUBLISHED + _SMALLER
    table = {name: _curve(name, layer, shares, multiple, measure) for name, layer in layers.items()}
    cuts = [-math.inf, *sorted({loss for curve in table.values() for loss, _ in curve})]
    low, high = 0, len(cuts) - 1  # the smallest cut that fits: spending falls as the cut rises
    while low < high:
        middle = (low + high) // 2
        if total_spend(layers, _at(table, cuts[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    return _at(table, cuts[low])


def _curve(
    name: str,
    layer: LayerInfo,
    shares: tuple[float, ...],
    multiple: int,
    measure: Callable[[str, Sequence[int]], Sequence[float]],
) -> list[tuple[float, int]]:
    """(loss, rank) by falling rank, the losses made monotone: a smaller rank is never better than a larger one."""
    ranks = [rank for rank in dict.fromkeys(_rank(layer, share, multiple) for share in shares) if rank is not None]
    losses = [math.inf if math.isnan(loss) else loss for loss in measure(name, ranks)]
    return list(zip(accumulate(losses, max), ranks, strict=True))


def _rank(layer: LayerInfo, share: float, multiple: int) -> int | None:
    return dense_or(layer, int(share * layer.size / layer.unit), multiple)


def _at(table: Mapping[str, list[tuple[float, int]]], cut: float) -> Ranks:
    return {name: min((rank for loss, rank in curve if loss <= cut), default=None) for name, curve in table.items()}
