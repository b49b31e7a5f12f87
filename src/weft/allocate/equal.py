"""equal: the same size for every matrix, a rank or a width of code; what quantisers and compensations publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from weft.allocate.base import Allocator, Choice, Choices, LayerInfo, check_reach, spent
from weft.errors import WeftError

__all__ = ["ALLOCATION", "allocate"]


def allocate(layers: Mapping[str, LayerInfo], budget: int) -> Choices:
    """The largest size that fits the budget when every matrix has it, or the largest that it can have below it."""
    check_reach(layers, budget)
    for layer in layers.values():
        _check_order([choice.size for choice in layer.choices if choice.size is not None])
    offered = (choice.size for layer in layers.values() for choice in layer.choices if choice.size is not None)
    sizes = [size for size, _ in groupby(sorted(offered))]
    best = {name: layer.choices[0] for name, layer in layers.items()}
    low, high = 0, len(sizes)
    while low < high:  # spending grows with the size
        middle = (low + high) // 2
        found = {name: _up_to(layer, sizes[middle]) for name, layer in layers.items()}
        if spent(found) <= budget:
            best, low = found, middle + 1
        else:
            high = middle
    return best


def _check_order(sizes: Sequence[Any]) -> None:
    """Raises WeftError where sizes, by rising bytes, do not rise themselves: no one of them then suits every matrix."""
    for small, large in pairwise(sizes):
        if not small <= large:
            raise WeftError(
                f"The size {large} takes more bytes than {small} and is no larger, so that none is the same for every "
                "matrix; give allocate='best', or 'uniform' for the same share of bytes."
            )


def _up_to(layer: LayerInfo, size: Any) -> Choice:
    there = [choice for choice in layer.choices if choice.size is not None and choice.size <= size]
    return there[-1] if there else layer.choices[0]


ALLOCATION = Allocator(
    name="equal",
    summary="The same size for every matrix: one rank, or one width of code.",
    paper="the default of quantisers and of EoRA",
    allocate=allocate,
)
