"""Merging: several low-rank deltas or outputs become one, and arithmetic on differences of weights.

Functions on tensors; `MERGERS` holds the records by name.
"""

from __future__ import annotations

from weft.merging import cmlora, lego, signatures, sums
from weft.merging.base import Merger, Pair
from weft.records import Table

__all__ = ["MERGERS", "Merger", "Pair"]

MERGERS = Table(
    Merger,
    (
        sums.LINEAR,
        sums.CAT,
        sums.SVD,
        lego.MERGER,
        signatures.MERGER,
        cmlora.MERGER,
    ),
)
