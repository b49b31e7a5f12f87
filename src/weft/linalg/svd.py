"""Singular value decompositions of a matrix W (out, in): exact, and one-sided through the smaller Gram matrix.

Letters: U (out, r), s (r,) falling, V (r, in), with W = U diag(s) V at full rank. All inputs may be of any float dtype,
strided, empty or rank-deficient; work is done in fp32 or wider, at a scale where no square overflows. Few triplets of a
large matrix come from the smaller of its two Gram matrices, in fp64, and without those that nobody asked for
(`weft.linalg.krylov`). Randomised and warm-started forms are in `weft.linalg.subspace`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.linalg.krylov import block_size, leading_eigenvectors, worthwhile

__all__ = [
    "low_rank_factors",
    "minor_svd",
    "product_factors",
    "pseudo_inverse_apply",
    "singular_values",
    "truncated_svd",
    "widen",
]

_LARGE = 256  # below this a whole SVD takes milliseconds
_ROUNDING = 1e-10  # eigenvalues of a Gram matrix below this, relative to the largest, give no vectors to be trusted


def widen(matrix: Tensor) -> Tensor:
    """The matrix in fp32, or in fp64 when it already is; factorisations are never done in half precision."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def truncated_svd(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets (all of them for None): U (out, r), s (r,), V (r, in).

    The best rank-r approximation in every unitarily invariant norm (Eckart and Young, 1936; Mirsky, 1960). Its error
    is within 1e-6 of the least one, however it was found.
    """
    scaled, size = _unit_scale(widen(matrix))
    few = rank is not None and scaled.dim() == 2 and min(scaled.shape) >= _LARGE and 4 * rank <= min(scaled.shape)
    found = _leading(scaled, rank) if few and rank else None
    U, s, V = torch.linalg.svd(scaled, full_matrices=False) if found is None else found
    rank = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    return U[..., :rank], s[..., :rank] * size, V[..., :rank, :]


def minor_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` smallest of the min(out, in) singular triplets, their values falling, in fp64."""
    scaled, size = _unit_scale(matrix.double())
    found = None
    if scaled.dim() == 2 and min(scaled.shape) >= _LARGE:
        flipped = scaled.shape[0] > scaled.shape[1]
        W = scaled.mT if flipped else scaled
        values, vectors = torch.linalg.eigh(W @ W.mT)
        found = _triplets(W, vectors[:, :rank].mT, flipped) if bool(values[0] > _ROUNDING * values[-1]) else None
    U, s, V = torch.linalg.svd(scaled, full_matrices=False) if found is None else found
    return U[..., -rank:], s[..., -rank:] * size, V[..., -rank:, :]


def singular_values(matrix: Tensor) -> Tensor:
    """All min(out, in) singular values, falling, in fp64: (min(out, in),).

    Of a large matrix to 1e-8 of the largest, from the smaller Gram matrix.
    """
    scaled, size = _unit_scale(matrix.double())
    if scaled.dim() != 2 or min(scaled.shape) < _LARGE:
        return torch.linalg.svdvals(scaled) * size
    wide = scaled if scaled.shape[0] <= scaled.shape[1] else scaled.mT
    values: Tensor = torch.linalg.eigvalsh(wide @ wide.mT).flip(0).clamp(min=0).sqrt()
    return values * size


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


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets through the smaller Gram matrix; None where they are too small for it, 1e-5 of the largest."""
    flipped = matrix.shape[0] > matrix.shape[1]
    W = (matrix.mT if flipped else matrix).double()
    left = _leading_left(W, rank)
    if left is None:
        return None
    U, s, V = (factor.to(matrix.dtype) for factor in _triplets(W, left, flipped))
    return U, s, V


def _triplets(W: Tensor, left: Tensor, flipped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of W (of its transpose, if flipped) in the span of left singular vectors, given as rows (r, m).

    By an SVD of r rows: orthonormal and in order to rounding, whatever the Gram matrix has lost.
    """
    Q, R = torch.linalg.qr((left @ W).mT)
    turn, s, right = torch.linalg.svd(R.mT)
    U, V = left.mT @ turn, right @ Q.mT
    return (V.mT, s, U.mT) if flipped else (U, s, V)


def _leading_left(W: Tensor, rank: int) -> Tensor | None:
    """Leading left singular vectors, as rows (rank, m), of W (m, n), m <= n."""
    gram, size = None, len(W)
    if worthwhile(size, rank):
        if size <= 32 * block_size(rank):  # then the Gram matrix costs less than products with W one after another
            gram = W @ W.mT
        found = leading_eigenvectors(
            lambda x: (x @ W) @ W.mT if gram is None else x @ gram, size, rank, device=W.device
        )
        if found is not None:
            return found[1]
    values, vectors = torch.linalg.eigh(W @ W.mT if gram is None else gram)
    return vectors.flip(1)[:, :rank].mT if bool(values[-rank] > _ROUNDING * values[-1]) else None


def _unit_scale(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix divided by its largest magnitude, and that magnitude (1 for an empty or zero matrix)."""
    if matrix.numel() == 0:
        return matrix, matrix.new_ones(())
    size = matrix.abs().amax()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return matrix / size, size
