"""The record of a way to merge: several low-rank deltas become one, or several outputs do.

    merge(pairs, rank, generator, **options) -> (B (out, k), A (k, in))        of one layer

where each pair is B_j (out, r_j), A_j (r_j, in) in fp64, its scale and weight folded into B_j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from weft.records import Record

__all__ = ["Merger", "Pair"]

Pair = tuple[Tensor, Tensor]
"""B (out, r) and A (r, in)."""


@dataclass(frozen=True, kw_only=True)
class Merger(Record):
    """One way to merge, as data.

    Args:
        kind: "merge" (deltas become one adapter, `weft.combine`) or "mix" (outputs become one, `weft.mix`).
        merge: for "merge": (pairs, rank, generator, **options) -> pair.
        ranked: whether `rank` has a say; else the rank follows from the adapters.
        takes: how many adapters, where their order means something: each is then handed over, as a pair of rank 0 where
            it lacks the layer. None for any number, in any order, those that have the layer.
        weights: for "mix": (number of adapters, **options) -> the weight of each.
    """

    kind: str = "merge"
    merge: Callable[..., Pair] | None = None
    ranked: bool = False
    takes: int | None = None
    weights: Callable[..., list[float]] | None = None
