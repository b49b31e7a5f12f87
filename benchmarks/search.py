"""Tuning one number, the learning rate, the same way for everybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["tuned"]


def tuned(
    centre: float,
    factor: float,
    tries: int,
    run: Callable[[float], dict[str, Any]],
    first: Sequence[int] = (0, 1, -1),
) -> dict[str, Any]:
    """The best of centre * factor^k by its "loss", searched uphill in both directions from the best k of `first`.

    The best rate has been seen to beat both its neighbours, or `at_the_edge` says that `tries` runs did not suffice.
    """
    found: dict[int, dict[str, Any]] = {}
    wanted = list(first)
    while wanted and len(found) < tries:
        k = wanted.pop(0)
        found[k] = run(centre * factor**k)
        best = min(found, key=lambda j: (found[j]["loss"], j))
        wanted = wanted or [j for j in (best - 1, best + 1) if j not in found]
    bracketed = {best - 1, best + 1} <= found.keys()
    return {**found[best], "at_the_edge": not bracketed, "tried": [found[k] for k in sorted(found)]}
