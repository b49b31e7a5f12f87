"""allora: LoRA without dropout and without a scale, whose short rows take longer steps (Huang and Balestriero, 2024,
arXiv 2410.09692).

    y = W x + B A x;   c_i = 1 / sqrt(||w_i||_2 + 1 / eta^2) times the step of row i of A and of B
    eta for a row of zeros, as at B's start; about ||w_i||^(-1/2) for long ones;   r (in + out) trainable numbers

c multiplies the step, after Adam's normalisation, which would undo a factor on the gradient; with SGD the two are one.
Weight decay shortens rows and so lengthens their steps: use none. Without alpha / r, eta is tuned anew for each rank.
Deviations: the paper writes c on the gradient. Rows are those of the stored factors: one factor an output of B, one a
component of A.
"""

from __future__ import annotations

import math

from weft.errors import WeftError
from weft.methods import lora
from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split
from weft.rules.row_rates import RowRates
from weft.terms import LowRank

__all__ = ["METHOD", "split"]


def split(site: Site, *, eta: float) -> Split:
    """LoRA's start with scale 1."""
    if not 0 < eta < math.inf:
        raise WeftError(f"eta is {eta}: a row of zeros takes eta times its step, so give a positive, finite number.")
    B, A = (factor.to(site.device, site.dtype) for factor in lora.initialise(site, 1.0))
    return Split({"": LowRank.from_factors(B, A)})


METHOD = Method(
    name="allora",
    kind="adapt",
    summary="LoRA without dropout and scale, whose rows step the farther the shorter they are.",
    paper="Huang and Balestriero, 2024, arXiv 2410.09692",
    split=split,
    count=lora_count,
    rules=(RowRates,),
    defaults={"eta": 2.0},
)
