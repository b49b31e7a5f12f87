"""modegpt: blocks that change what passes through them more, keep more (Lin et al., 2024, arXiv 2408.09632, ICLR 2025).

    phi_l = L phi softmax(-s / epsilon)_l,   at most `most`, the excess over the others in proportion
    s_l = 1 - E[cos(x, y)]   with x what goes into the block l of L, and y what comes out of it

is the share cut of everything in the block, phi the mean share that meets the budget; what the sizes' steps leave of
the budget goes to the layers in the order of their influence.

Deviations: phi is found so that the bytes, not the shares, meet the budget; epsilon could not be confirmed in the
paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weft.allocate.base import Allocator, Choices, LayerInfo, bisect_threshold, check_reach, spent

__all__ = ["ALLOCATION", "allocate", "shares_cut"]


def allocate(
    layers: Mapping[str, LayerInfo],
    budget: int,
    *,
    influence: Mapping[str, float],
    epsilon: float = 0.1,
    most: float = 0.8,
) -> Choices:
    """The sizes of the largest shares that fit the budget.

    Args:
        influence: s of each layer's block.
        epsilon: how evenly the cut is spread; large for evenly.
        most: of a block that may be cut, as long as the budget can be met so.

    Raises:
        WeftError: the smallest sizes together exceed the budget.
    """
    check_reach(layers, budget)
    s = {depth: influence[name] for name, depth in ((name, layer.depth) for name, layer in layers.items())}

    def choices_at(kept: float) -> Choices:
        cut = dict(zip(s, shares_cut(list(s.values()), 1 - kept, epsilon, max(most, 1 - kept)), strict=True))
        return {
            name: layer.within((1 - cut[layer.depth]) * layer.shape.nbytes + 1e-6) for name, layer in layers.items()
        }

    chosen = bisect_threshold(layers, budget, choices_at)
    for name in sorted(layers, key=lambda name: -influence[name]):
        left = budget - spent(chosen) + chosen[name].bytes
        larger = [choice for choice in layers[name].choices if chosen[name].bytes < choice.bytes <= left]
        chosen[name] = larger[0] if larger else chosen[name]
    return chosen


def shares_cut(s: list[float], mean: float, epsilon: float, most: float) -> list[float]:
    """phi of each block: of the given mean, and none above `most`."""
    weights = torch.softmax(-torch.tensor(s, dtype=torch.float64) / epsilon, 0)
    phi, capped = len(s) * mean * weights, torch.zeros(len(s), dtype=torch.bool)
    while bool((phi > most + 1e-12).any()):
        capped |= phi >= most
        left = len(s) * mean - most * int(capped.sum())
        free = torch.where(capped, 0.0, weights)
        phi = torch.where(capped, most, left * free / free.sum().clamp(min=1e-300))
    return phi.tolist()  # type: ignore[no-any-return]


ALLOCATION = Allocator(
    name="modegpt",
    summary="Blocks that change what passes through them less are cut more: a softmax of their influence.",
    paper="Lin et al., 2024, arXiv 2408.09632",
    allocate=allocate,
    reads=("influence",),
)
