"""Scaling laws: published ones as calculators, one file each, and fits of your own runs. `LAWS` holds their records.

Example:
    >>> said = weft.scaling.LAWS["step-law"].predict(parameters="1B", tokens="100B")
    >>> round(said["lr"], 5), said["batch"]
    (0.00166, 541)
"""

from __future__ import annotations

from weft.records import Table
from weft.scaling import chinchilla, fast_scaling, knowledge_capacity, qid_law, step_law, token_crisis, vocab_law
from weft.scaling.base import Law, Quantity, number
from weft.scaling.fit import Fit, fit

__all__ = ["LAWS", "Fit", "Law", "Quantity", "fit", "number"]

LAWS = Table(
    Law,
    [page.LAW for page in (step_law, chinchilla, vocab_law, qid_law, knowledge_capacity, fast_scaling, token_crisis)],
)
