"""best: the ranks of least predicted loss within the budget.

For every layer, `losses[r]` is what keeping r components of *this method's* factors costs in the Kronecker-factored
Fisher norm, tr(D^T G D X): one unit for all layers (see `weft.methods.kfac_svd`). Minimising their sum under a
parameter budget is a separable problem. On each layer's lower convex hull of (parameters, loss), whose last point is
the dense matrix at loss 0, the greedy by steepest gain per parameter is exact up to one step; where that step is large,
uniform ranks may lose less, and are taken.

Ranking the singular directions of all layers by a loss in one unit under one budget is IO-SVD's idea too (Abbasi et
al., 2026, arXiv 2605.15626: first-order estimates of the loss, components pruned one by one) and LEMS's (Thoma et al.,
ICML 2026, openreview IjIgNPFuCt: the tail's energy calibrated by one measured point a layer and a depth factor, solved
as an integer program); the greedy on hulls is bit allocation's (Shoham and Gersho, 1988). That factors stop to pay
where a matrix may stay dense is discussed by ARA (arXiv 2510.19389); here the dense matrix is a point of every curve.
Deviations: second-order predictions of the truncation itself, where IO-SVD estimates to first order and LEMS measures;
a floor of 15 % of the uniform rank, which neither has.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from weft.allocate import uniform
from weft.allocate.base import LayerInfo, Ranks, check_reach, rank_limit, spend

__all__ = ["READS", "allocate", "predicted_loss"]

READS = ("losses",)


@dataclass(frozen=True)
class _Point:
    rank: int | None
    cost: int
    loss: float


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, multiple: int = 1, floor: float = 0.15) -> Ranks:
    """Greedy on the hulls, from a floor of `floor` times each matrix's uniform rank; or uniform, if that loses less.

    Raises:
        WeftError: a rank of one `multiple` each already exceeds the budget.
    """
    check_reach(layers, budget, multiple)
    greedy, even = _greedy(layers, budget, multiple, floor), uniform.allocate(layers, budget, multiple=multiple)
    return min(greedy, even, key=lambda ranks: predicted_loss(layers, ranks))


def predicted_loss(layers: Mapping[str, LayerInfo], ranks: Ranks) -> float:
    """What the ranks cost together; a dense matrix costs nothing."""
    losses = [(layer.losses, ranks[name]) for name, layer in layers.items()]
    return sum(float(curve[rank]) for curve, rank in losses if curve is not None and rank is not None)


def _greedy(layers: Mapping[str, LayerInfo], budget: int, multiple: int, floor: float) -> Ranks:
    """By steepest gain per parameter, until nothing that gains can be paid."""
    share = budget / sum(layer.size for layer in layers.values())
    curves = {
        name: _points(layer, int(floor * share * layer.size / layer.unit), multiple) for name, layer in layers.items()
    }
    left = budget - sum(points[0].cost for points in curves.values())
    if left < 0:
        return _greedy(layers, budget, multiple, floor=0.0)

    hulls = {name: _lower_hull(points) for name, points in curves.items()}  # each begins with what is chosen so far
    steps = [(-_gain(hull[0], hull[1]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        chosen, wanted = hulls[name][0], hulls[name][1]
        if wanted.cost - chosen.cost <= left:
            left -= wanted.cost - chosen.cost
            hulls[name].popleft()
        else:  # go on with what can still be paid: shorter steps, in their own order of gain
            hulls[name] = _lower_hull([p for p in curves[name] if chosen.cost <= p.cost <= chosen.cost + left])
        if len(hulls[name]) > 1:
            heapq.heappush(steps, (-_gain(hulls[name][0], hulls[name][1]), name))
    return {name: hull[0].rank for name, hull in hulls.items()}


def _points(layer: LayerInfo, floor: int, multiple: int) -> list[_Point]:
    """The layer's choices by rising cost: ranks that are multiples, then dense at loss 0."""
    assert isinstance(layer.losses, Tensor)
    losses = layer.losses.tolist()
    start = max(floor // multiple, 1) * multiple
    ranks = range(start, min(rank_limit(layer, multiple), len(losses) - 1) + 1, multiple)
    return [_Point(r, spend(layer, r), losses[r]) for r in ranks] + [_Point(None, layer.size, 0.0)]


def _lower_hull(points: list[_Point]) -> deque[_Point]:
    """The lower convex hull of (cost, loss), from the first point on."""
    hull: deque[_Point] = deque()
    for point in points:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        if not hull or point.loss < hull[-1].loss:
            hull.append(point)
    return hull


def _gain(a: _Point, b: _Point) -> float:
    """Loss saved a parameter on the way from a to b."""
    return (a.loss - b.loss) / (b.cost - a.cost)
