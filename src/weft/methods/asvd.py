"""asvd: SVD of the weight with each input column scaled by how large its activations are (Yuan et al., 2023, arXiv
2312.05821).

    S = diag(a^alpha),  a_j = E|x_j|,   W' = truncate(W S) S^-1,   i.e. the diagonal input metric a^(2 alpha).

Its published allocation, `asvd`, searches a table of per-layer sensitivities.
Deviations: an exact SVD where the official code draws a randomised one without oversampling or seed; the scale's 1e-6
is relative to its mean.
"""

from __future__ import annotations

from torch import Tensor

from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, Method, Moments, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise"]


def factorise(W: Tensor, moments: Moments, *, alpha: float = 0.5) -> Factors:
    """Factors of W in the metric diag(E|x|^(2 alpha)); alpha = 0 is the plain SVD."""
    return Factors(*principal_factors(W, C=moments["input_abs_mean"].double() ** (2 * alpha), ridge=1e-6))


METHOD = Method(
    name="asvd",
    kind="compress",
    summary="SVD with input channels scaled by their mean activation, so that outlier channels survive.",
    paper="Yuan et al., 2023, arXiv 2312.05821",
    needs=("input_abs_mean",),
    allocate="asvd",
    split=low_rank_split(factorise),
    trained=low_rank_terms,
    defaults={"alpha": 0.5},
)
