"""kfac-svd: the truncation that costs the loss least to second order, whitened on both sides (weft's own).

The loss increase of a change D = W' - W is about 1/2 vec(D)^T F vec(D), and the Fisher block of a linear layer is close
to X (x) G (Martens and Grosse, 2015, arXiv 1503.05671): X the second moment of its inputs, G that of the loss gradient
at its outputs. So W' is the rank-r minimiser of tr(D^T G D X), and half the sum of the dropped s^2 predicts the loss,
in one unit for all layers: the allocation `best` spends one budget on them.
"""

from __future__ import annotations

from torch import Tensor

from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, Method, Moments, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise"]


def factorise(W: Tensor, moments: Moments, *, ridge: float = 1e-4) -> Factors:
    """Factors of W in the (G, X) norm; `ridge` is relative to each moment's mean diagonal."""
    return Factors(*principal_factors(W, C=moments["input_moment"], M=moments["output_grad_moment"], ridge=ridge))


METHOD = Method(
    name="kfac-svd",
    kind="compress",
    summary="SVD whitened by the Fisher matrix's Kronecker factors; with `best`, one budget of predicted loss.",
    paper="weft, 2026",
    needs=("input_moment", "output_grad_moment"),
    allocate="best",
    split=low_rank_split(factorise),
    trained=low_rank_terms,
    defaults={"ridge": 1e-4},
)
