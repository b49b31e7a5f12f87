"""lrp-pruning: the units of all layers in one ranking, the most relevant of the network stay (Yeom et al., 2021, arXiv
1912.08881).

Scores are of sum 1 in each layer, so that wide layers, where each unit has less, are cut more; no layer goes below the
smallest size that it offers.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weft.allocate.base import Allocator, Choices, LayerInfo, bisect_threshold, check_reach

__all__ = ["ALLOCATION", "allocate"]


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, relevance: Mapping[str, Tensor]) -> Choices:
    """The sizes of the highest ranks that fit the budget.

    Args:
        relevance: scores of each layer's units (groups, n); every group of a layer keeps as many.

    Raises:
        WeftError: the smallest sizes together exceed the budget.
    """
    check_reach(layers, budget)
    everything = torch.cat([relevance[name].flatten() for name in layers]).sort(descending=True).values

    def choices_at(share: float) -> Choices:
        least = everything[max(round(share * len(everything)), 1) - 1]
        kept = {name: int((relevance[name] >= least).sum()) // len(relevance[name]) for name in layers}
        return {name: layer.at_rank(kept[name]) for name, layer in layers.items()}

    return bisect_threshold(layers, budget, choices_at)


ALLOCATION = Allocator(
    name="lrp-pruning",
    summary="The units of all layers in one ranking by relevance: the first of it stay.",
    paper="Yeom et al., 2021, arXiv 1912.08881",
    allocate=allocate,
    reads=("relevance",),
)
