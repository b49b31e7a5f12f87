"""afm: atomic feature mimicking, a principal component analysis of what the layer outputs (Yu and Wu, AAAI 2023; used
by arXiv 2405.18146).

    m = W mu + b,   Cov = W (C - mu mu^T) W^T,   U_r = its leading eigenvectors
    y' = U_r U_r^T (W x + b) + (I - U_r U_r^T) m

which is the low-rank weight U_r (U_r^T W) with the bias b + (W - U_r U_r^T W) mu: the best affine rank-r map on the
data. A layer without a bias gains one; `bias=False` keeps it without, and then the uncentred components are the optimum
(svd-llm's answer).
Deviations: output statistics are derived from the input's mean mu and second moment C, which every other method shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, Method, Moments, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise"]


def factorise(W: Tensor, moments: Moments, *, bias: bool = True, ridge: float = 1e-4) -> Factors:
    """Factors of W in the metric of the inputs' covariance, and the mean that the new bias restores."""
    C, mu = moments["input_moment"].double(), moments["input_mean"].double()
    if not bias:
        return Factors(*principal_factors(W, C=C, ridge=ridge))
    covariance = C - torch.outer(mu, mu)
    return Factors(*principal_factors(W, C=covariance, ridge=ridge), mean=mu)


METHOD = Method(
    name="afm",
    kind="compress",
    summary="Principal components of the layer's outputs, with a bias that restores their mean.",
    paper="Yu and Wu, 2023, doi:10.1609/aaai.v37i9.26304",
    needs=("input_moment", "input_mean"),
    split=low_rank_split(factorise),
    trained=low_rank_terms,
    defaults={"bias": True, "ridge": 1e-4},
)
