"""energy: every matrix keeps the same share of its squared singular values, in the metric of its method.

The common criterion of principal component analysis (Jolliffe, 2002, section 6.1.1), one threshold for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.allocate.base import Allocator, Choices, LayerInfo, bisect_threshold
from weft.linalg.spectrum import energy_curve

__all__ = ["ALLOCATION", "allocate"]


def allocate(layers: Mapping[str, LayerInfo], budget: int) -> Choices:
    """The largest common energy share whose ranks fit the budget."""
    curves = {name: energy_curve(layer.spectrum) for name, layer in layers.items() if layer.spectrum is not None}

    def choices_at(share: float) -> Choices:
        return {name: layer.at_rank(int((curves[name] < share).sum()) + 1) for name, layer in layers.items()}

    return bisect_threshold(layers, budget, choices_at)


ALLOCATION = Allocator(
    name="energy",
    summary="The same share of squared singular values for every matrix.",
    paper="folklore; the share of energy kept, as in principal component analysis",
    allocate=allocate,
    reads=("spectrum",),
)
