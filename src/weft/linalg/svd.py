"""Singular value decompositions of a matrix W (out, in): exact, and one-sided through the smaller Gram matrix.

Letters: U (out, r), s (r,) falling, V (r, in), with W = U diag(s) V at full rank. All inputs may be of any float dtype,
strided, empty or rank-deficient; work is done in fp32 or wider, at a scale where no square overflows. Randomised and
warm-started forms are in `weft.linalg.subspace`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["low_rank_factors", "product_factors", "pseudo_inverse_apply", "singular_values", "truncated_svd", "widen"]


def widen(matrix: Tensor) -> Tensor:
    """The matrix in fp32, or in fp64 when it already is; factorisations are never done in half precision."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def truncated_svd(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets (all of them for None): U (out, r), s (r,), V (r, in).

    The best rank-r approximation in every unitarily invariant norm (Eckart and Young, 1936; Mirsky, 1960).
    """
    scaled, size = _unit_scale(widen(matrix))
    U, s, V = torch.linalg.svd(scaled, full_matrices=False)
    rank = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    return U[..., :rank], s[..., :rank] * size, V[..., :rank, :]


def singular_values(matrix: Tensor) -> Tensor:
    """All min(out, in) singular values, falling, in fp64 (fp32 on devices without it): (min(out, in),)."""
    scaled, size = _unit_scale(matrix.double())
    return torch.linalg.svdvals(scaled) * size


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) = U sqrt(s), A (r, in) = sqrt(s) V: the best rank-r product, its size shared evenly."""
    U, s, V = truncated_svd(matrix, rank)
    root = s.sqrt()
    return U * root, root.unsqueeze(-1) * V


def product_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """U sqrt(s) (out, r) and sqrt(s) V (r, in) of the product B A = U diag(s) V, for B (out, r) and A (r, in).

    Through the QR decompositions of B and A^T and an SVD of the r x r core: O((out + in) r^2), no (out, in) matrix.
    """
    Q_B, R_B = torch.linalg.qr(widen(B))
    Q_A, R_A = torch.linalg.qr(widen(A).mT)
    U, s, V = truncated_svd(R_B @ R_A.mT)
    root = s.sqrt()
    spare = B.shape[1] - len(s)  # a rank above the matrix's size: components of value zero
    return F.pad((Q_B @ U) * root, (0, spare)), F.pad(root.unsqueeze(-1) * (V @ Q_A.mT), (0, 0, 0, spare))


def pseudo_inverse_apply(matrix: Tensor, right: Tensor, *, tolerance: float | None = None) -> Tensor:
    """M^+ R for M (m, n) and R (m, k): (n, k), the least-squares solution of smallest norm (Moore-Penrose).

    Singular values at or below `tolerance` (relative to the largest; None: max(m, n) * machine epsilon) count as zero.
    """
    U, s, V = truncated_svd(matrix)
    if s.numel() == 0:
        return right.new_zeros(matrix.shape[1], right.shape[1])
    relative = max(matrix.shape) * torch.finfo(s.dtype).eps if tolerance is None else tolerance
    inverse = torch.where(s > relative * s[0], 1 / s, torch.zeros_like(s))
    return V.mH @ (inverse.unsqueeze(-1) * (U.mH @ right.to(U.dtype)))


def _unit_scale(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix divided by its largest magnitude, and that magnitude (1 for an empty or zero matrix)."""
    if matrix.numel() == 0:
        return matrix, matrix.new_ones(())
    size = matrix.abs().amax()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return matrix / size, size
