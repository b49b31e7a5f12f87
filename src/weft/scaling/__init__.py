"""Scaling laws: published ones as calculators, one file each, and fits of your own runs. `LAWS` holds their records."""

from __future__ import annotations

from weft.records import Table
from weft.scaling import chinchilla, fast_scaling, knowledge_capacity, qid_law, step_law, vocab_law
from weft.scaling.base import Law, Quantity, number
from weft.scaling.fit import Fit, fit

__all__ = ["LAWS", "Fit", "Law", "Quantity", "fit", "number"]

LAWS = Table(
    Law,
    [page.LAW for page in (step_law, chinchilla, vocab_law, qid_law, knowledge_capacity, fast_scaling)],
)
