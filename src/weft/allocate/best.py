"""best: the ranks of least predicted loss within the budget (weft's own).

For every layer, `losses[r]` is what keeping r components of *this method's* factors costs in the Kronecker-factored
Fisher norm, tr(D^T G D X): one unit for all layers (see `weft.methods.kfac_svd`). Minimising their sum under a
parameter budget is a separable problem. On each layer's lower convex hull of (parameters, loss), whose last point is
the dense matrix at loss 0, the greedy by steepest gain per parameter is exact up to one step.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from weft.allocate.base import LayerInfo, Ranks, below_reach, dense_or, rank_limit, spend, total_spend

__all__ = ["READS", "allocate"]

READS = ("losses",)


@dataclass(frozen=True)
class _Point:
    rank: int | None
    cost: int
    loss: float


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, multiple: int = 1, floor: float = 0.15) -> Ranks:
    """Greedy on the hulls, from a floor of `floor` times each matrix's uniform rank; what the last step leaves is spent
    on smaller ones.

    Raises:
        WeftError: the floors alone exceed the budget.
    """
    share = budget / sum(layer.size for layer in layers.values())
    curves = {
        name: _points(layer, int(floor * share * layer.size / layer.unit), multiple) for name, layer in layers.items()
    }
    chosen = {name: points[0] for name, points in curves.items()}
    left = budget - sum(point.cost for point in chosen.values())
    if left < 0:
        least: Ranks = {name: dense_or(layer, 1, multiple) for name, layer in layers.items()}
        if total_spend(layers, least) > budget:
            raise below_reach(layers, least, budget)
        return allocate(layers, budget, multiple=multiple, floor=0.0)

    hulls = {name: _lower_hull(points) for name, points in curves.items()}
    steps = [(-_gain(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, i = heapq.heappop(steps)
        wanted = hulls[name][i]
        if wanted.cost - chosen[name].cost <= left:
            left -= wanted.cost - chosen[name].cost
            chosen[name] = wanted
            if i + 1 < len(hulls[name]):
                heapq.heappush(steps, (-_gain(hulls[name][i], hulls[name][i + 1]), name, i + 1))
        else:
            # the step is too large: go as far towards it as the money lasts, and let smaller steps have the rest
            reachable = [p for p in curves[name] if chosen[name].cost < p.cost <= chosen[name].cost + left]
            if reachable:
                best = min(reachable, key=lambda p: p.loss)
                left -= best.cost - chosen[name].cost
                chosen[name] = best
    return {name: point.rank for name, point in chosen.items()}


def _points(layer: LayerInfo, floor: int, multiple: int) -> list[_Point]:
    """The layer's choices by rising cost: ranks that are multiples, then dense at loss 0."""
    assert isinstance(layer.losses, Tensor)
    losses = layer.losses.tolist()
    start = max(floor // multiple, 1) * multiple
    ranks = range(start, min(rank_limit(layer, multiple), len(losses) - 1) + 1, multiple)
    return [_Point(r, spend(layer, r), losses[r]) for r in ranks] + [_Point(None, layer.size, 0.0)]


def _lower_hull(points: list[_Point]) -> list[_Point]:
    """The lower convex hull of (cost, loss), from the first point on."""
    hull: list[_Point] = []
    for point in points:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        if not hull or point.loss < hull[-1].loss:
            hull.append(point)
    return hull


def _gain(a: _Point, b: _Point) -> float:
    """Loss saved a parameter on the way from a to b."""
    return (a.loss - b.loss) / (b.cost - a.cost)
