"""Merging: several low-rank deltas become one, and arithmetic on differences of weights. Functions on tensors, one file
a method.

    merger(pairs, rank, generator, **options) -> (B (out, k), A (k, in))        of one layer

where each pair is B_j (out, r_j), A_j (r_j, in) in fp64, its scale and weight folded into B_j.
"""

from __future__ import annotations

from collections.abc import Callable

from weft.merging.lego import lego
from weft.merging.sums import Pair, cat, linear, svd

__all__ = ["MERGERS", "Pair"]

MERGERS: dict[str, Callable[..., Pair]] = {"linear": linear, "cat": cat, "svd": svd, "lego": lego}
