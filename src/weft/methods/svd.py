"""svd: truncated SVD of the weight alone, the best rank-r W' in the Frobenius norm (Eckart and Young, 1936)."""

from __future__ import annotations

from torch import Tensor

from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, Method, Moments, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise"]


def factorise(W: Tensor, moments: Moments) -> Factors:
    """W = U diag(s) V, its size shared evenly: B = U sqrt(s), A = sqrt(s) V."""
    return Factors(*principal_factors(W))


METHOD = Method(
    name="svd",
    kind="compress",
    summary="Truncated SVD of the weight alone; the floor that every data-aware method must beat.",
    paper="Eckart and Young, 1936, doi:10.1007/BF02288367",
    split=low_rank_split(factorise),
    trained=low_rank_terms,
)
