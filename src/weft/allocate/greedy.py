"""Least predicted loss within a budget, by the steepest gain a byte on each layer's lower convex hull.

    minimise sum_l loss_l(c_l)   with one choice c_l for each layer, sum_l bytes_l(c_l) <= budget

On the hulls of (bytes, loss) the greedy is exact up to its last step (Shoham and Gersho, 1988); what that leaves over
is spent on shorter steps, in their own order of gain. `weft.allocate.integer_program` solves the same program exactly.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence

from weft.allocate.base import Choice, Choices

__all__ = ["solve"]


def solve(curves: Mapping[str, Sequence[Choice]], budget: int) -> Choices | None:
    """One choice of each curve (by rising bytes), or None where even the smallest exceed the budget."""
    left = budget - sum(points[0].bytes for points in curves.values())
    if left < 0:
        return None
    hulls = {name: _lower_hull(points) for name, points in curves.items()}  # each begins with what is chosen so far
    steps = [(-_gain(hull[0], hull[1]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        chosen, wanted = hulls[name][0], hulls[name][1]
        if wanted.bytes - chosen.bytes <= left:
            left -= wanted.bytes - chosen.bytes
            hulls[name].popleft()
        else:  # go on with what can still be paid: shorter steps, in their own order of gain
            payable = [p for p in curves[name] if chosen.bytes <= p.bytes <= chosen.bytes + left]
            hulls[name] = _lower_hull(payable)
        if len(hulls[name]) > 1:
            heapq.heappush(steps, (-_gain(hulls[name][0], hulls[name][1]), name))
    return {name: hull[0] for name, hull in hulls.items()}


def _lower_hull(points: Sequence[Choice]) -> deque[Choice]:
    """The lower convex hull of (bytes, loss), from the first point on."""
    hull: deque[Choice] = deque()
    for point in points:
        if hull and point.bytes == hull[-1].bytes:
            if point.loss >= hull[-1].loss:
                continue
            hull.pop()
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        if not hull or point.loss < hull[-1].loss:
            hull.append(point)
    return hull


def _gain(a: Choice, b: Choice) -> float:
    """Loss saved a byte on the way from a to b."""
    return (a.loss - b.loss) / (b.bytes - a.bytes)
