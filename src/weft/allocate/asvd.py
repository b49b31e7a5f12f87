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
from typing import Any

from weft.allocate.base import Allocator, Choice, Choices, LayerInfo, check_reach, spent

__all__ = ["ALLOCATION", "allocate"]

_PUBLISHED = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_SMALLER = (0.3, 0.2, 0.1, 0.0)

Measure = Callable[[str, Sequence[Any]], Sequence[float]]


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, measure: Measure) -> Choices:
    """The cut of least loss that fits the budget.

    Args:
        measure: (layer, sizes) -> calibration losses with only that layer cut to each of them.

    Raises:
        WeftError: the smallest shares of the grid exceed the budget.
    """
    check_reach(layers, budget)
    smallest = {name: _at_share(layer, _PUBLISHED[-1]) for name, layer in layers.items()}
    shares = _PUBLISHED if spent(smallest) <= budget else _PUBLISHED + _SMALLER
    table = {name: _curve(name, layer, shares, measure) for name, layer in layers.items()}
    cuts = [-math.inf, *sorted({loss for curve in table.values() for loss, _ in curve})]
    low, high = 0, len(cuts) - 1  # the smallest cut that fits: spending falls as the cut rises
    while low < high:
        middle = (low + high) // 2
        if spent(_at(layers, table, cuts[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    return _at(layers, table, cuts[low])


def _curve(name: str, layer: LayerInfo, shares: tuple[float, ...], measure: Measure) -> list[tuple[float, Choice]]:
    """(loss, choice) by falling size, the losses made monotone: a smaller size is never better than a larger one."""
    tried = [c for c in dict.fromkeys(_at_share(layer, share) for share in shares) if c.size is not None]
    losses = [math.inf if math.isnan(loss) else loss for loss in measure(name, [c.size for c in tried])]
    return list(zip(accumulate(losses, max), tried, strict=True))


def _at_share(layer: LayerInfo, share: float) -> Choice:
    return layer.within(share * layer.shape.nbytes)


def _at(layers: Mapping[str, LayerInfo], table: Mapping[str, list[tuple[float, Choice]]], cut: float) -> Choices:
    return {
        name: min((c for loss, c in curve if loss <= cut), key=lambda c: c.bytes, default=layers[name].choices[-1])
        for name, curve in table.items()
    }


ALLOCATION = Allocator(
    name="asvd",
    summary="Sensitivity-based truncation rank search: each layer alone is cut and the calibration loss measured.",
    paper="Yuan et al., 2023, arXiv 2312.05821, section 3.3",
    allocate=allocate,
    reads=("spectrum", "measure"),
)
