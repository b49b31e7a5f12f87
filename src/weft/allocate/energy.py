"""energy: every matrix keeps the same share of its squared singular values, in the metric of its method.

The common criterion of principal component analysis (Jolliffe, 2002, section 6.1.1), one threshold for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.allocate.base import LayerInfo, Ranks, bisect_threshold, dense_or
from weft.linalg.spectrum import energy_curve

__all__ = ["READS", "allocate"]

READS = ("spectrum",)


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, multiple: int = 1) -> Ranks:
    """The largest common energy share whose ranks fit the budget."""
    curves = {name: energy_curve(layer.spectrum) for name, layer in layers.items() if layer.spectrum is not None}

    def ranks_at(share: float) -> Ranks:
        return {
            name: dense_or(layer, int((curves[name] < share).sum()) + 1, multiple) for name, layer in layers.items()
        }

    return bisect_threshold(layers, budget, ranks_at)
