"""uniform: the same share of every matrix's bytes; for factors r = floor(share * out * in / (out + in))."""

from __future__ import annotations

from collections.abc import Mapping

from weft.allocate.base import Allocator, Choices, LayerInfo, bisect_threshold

__all__ = ["ALLOCATION", "allocate"]


def allocate(layers: Mapping[str, LayerInfo], budget: int) -> Choices:
    """The largest common share whose sizes, the largest within it, fit the budget."""

    def choices_at(share: float) -> Choices:
        return {name: layer.within(share * layer.shape.nbytes + 1e-6) for name, layer in layers.items()}

    return bisect_threshold(layers, budget, choices_at)


ALLOCATION = Allocator(
    name="uniform",
    summary="The same share of every matrix.",
    paper="the default of most papers",
    allocate=allocate,
)
