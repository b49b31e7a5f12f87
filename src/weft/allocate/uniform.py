"""uniform: the same share of every matrix, r = floor(share * out * in / (out + in))."""

from __future__ import annotations

from collections.abc import Mapping

from weft.allocate.base import LayerInfo, Ranks, bisect_threshold, dense_or

__all__ = ["READS", "allocate"]

READS: tuple[str, ...] = ()


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, multiple: int = 1) -> Ranks:
    """The largest common share whose ranks, rounded down to a multiple, fit the budget.

    A matrix whose factors would not be smaller stays dense.
    """

    def ranks_at(share: float) -> Ranks:
        return {
            name: dense_or(layer, int(share * layer.size / layer.unit + 1e-9), multiple)
            for name, layer in layers.items()
        }

    return bisect_threshold(layers, budget, ranks_at)
