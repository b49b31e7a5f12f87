"""The one kernel of data-aware truncation: W (out, in) as rank-one terms ordered by their worth in a weighted norm.

For an input metric C (in, in) and an output metric M (out, out), the rank-r matrix W' that minimises
tr((W - W')^T M (W - W') C) is

    W' = L^-T U_r U_r^T L^T W,   M = L L^T,   U_r = leading eigenvectors of (L^T W) C (L^T W)^T

and the error left is the sum of the dropped eigenvalues. No inverse of C appears, so a singular C (fewer tokens than
channels) is no special case. With M = I this is the truncation-aware SVD of SVD-LLM (Wang et al., 2024, arXiv
2403.07378) and, for C a centred covariance, the principal components of the output (atomic feature mimicking); with C
and M both given, the Kronecker-factored Fisher norm of `kfac-svd`; with neither, the plain SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.linalg.whiten import Root, finite, moment_root

__all__ = ["even_split", "principal_factors", "tail_losses", "weighted_loss"]


def principal_factors(
    W: Tensor, C: Tensor | None = None, M: Tensor | None = None, *, ridge: float = 0.0, rank: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """B (out, m), A (m, in), s (m,), m = min(out, in): W = B A, and B[:, :r] A[:r] is the best W' of rank r.

    Args:
        W: (out, in), any float dtype.
        C: input metric: (in, in) second moment, (in,) its diagonal, or None for the identity.
        M: output metric: (out, out), (out,) its diagonal, or None for the identity.
        ridge: added to the diagonals of C and M, relative to their mean.
        rank: give only the first `rank` components; None for all m. s has all m values in either case.

    Returns:
        Factors in fp64, each component's size shared evenly between its column and its row, and s falling: the error of
        rank r is sum(s[r:]^2). At r = m the product is W itself where C and M are regular; where they are singular, it
        is so on their range.

    Raises:
        ValueError: C or M holds NaN or infinity.
    """
    H, left = _apply_output_metric(W.double(), M, ridge)
    B, A, s = _components(H, C, ridge, rank)
    if isinstance(left, Root):
        B = left.solve_transposed(B)
    elif left is not None:
        B = B / left.unsqueeze(1)
    return *even_split(B, A), s


def even_split(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Give each column of B (out, m) and its row of A (m, in) one norm; the product stays."""
    b, a = B.norm(dim=0), A.norm(dim=1)
    balance = torch.where((a > 0) & (b > 0), (a / b).sqrt(), torch.ones_like(a))
    return B * balance, A / balance.unsqueeze(1)


def tail_losses(B: Tensor, A: Tensor, C: Tensor, M: Tensor) -> Tensor:
    """What every truncation costs: (m + 1,), entry r is tr(D^T M D C) for D the sum of the components from r on.

    The components need not be orthogonal in this norm: the pairwise products P_kl = (b_k^T M b_l) (a_k^T C a_l) are
    summed over k, l >= r.
    """
    B, A = B.double(), A.double()
    pairs = (B.mT @ M.double() @ B) * (A @ C.double() @ A.mT)
    tails = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([tails, tails.new_zeros(1)]).clamp(min=0)


def weighted_loss(D: Tensor, C: Tensor, M: Tensor) -> Tensor:
    """tr(D^T M D C) of an error D (out, in), in fp64: what `tail_losses` gives for the tails of factors."""
    D = D.double()
    return ((M.double().to(D.device) @ D) * (D @ C.double().to(D.device))).sum().clamp(min=0)


def _apply_output_metric(W: Tensor, M: Tensor | None, ridge: float) -> tuple[Tensor, Root | Tensor | None]:
    """L^T W, and L to undo it: a Root, the diagonal of one, or None."""
    if M is None:
        return W, None
    if M.dim() == 1:
        root = _diagonal_root(M, ridge)
        return root.unsqueeze(1) * W, root
    left = moment_root(M, ridge=ridge)
    return left.factor.mT @ W, left


def _components(H: Tensor, C: Tensor | None, ridge: float, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """B (out, m), A (m, in), s (m,) falling, for the metric C alone: H = B A, sum(s[r:]^2) the error of rank r.

    Through the eigenvectors of the smaller Gram matrix in fp64, which take a fraction of an SVD's time. The product is
    exact whatever they have lost, since it is a projection of H (or the whole of it) that they only divide up; values
    below 1e-8 of the largest are rounding.
    """
    out, inn = H.shape
    size = H.abs().amax().clamp(min=torch.finfo(H.dtype).tiny) if H.numel() else 1.0
    H = H / size
    if C is not None and C.dim() == 2:
        U, s = _left_singular(H, C, ridge)
        U = U[:, :rank]
        return U, (U.mT @ H) * size, s * size
    root = H.new_ones(inn) if C is None else _diagonal_root(C, ridge)
    X = H if C is None else H * root
    if out <= inn:
        U, s = _falling(X @ X.mT)
        U = U[:, :rank]
        return U, (U.mT @ H) * size, s * size
    V, s = _falling(X.mT @ X)
    V = V[:, :rank]
    return (X @ V) * size, V.mT / root, s * size


def _left_singular(H: Tensor, C: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors (out, m) and values (m,) of H C^(1/2), falling."""
    out, inn = H.shape
    if out <= inn:
        # the eigenvectors of the smaller Gram matrix: no root of C is needed at all
        C = finite(C)
        ridged = C + torch.eye(inn, dtype=C.dtype, device=C.device) * (ridge * C.diagonal().mean())
        return _falling(H @ ridged @ H.mT)
    X = H @ moment_root(C, ridge=ridge).factor
    V, s = _falling(X.mT @ X)
    # the columns of X V are orthogonal but for rounding, so that no leading span is changed
    return torch.linalg.qr(X @ V).Q, s


def _falling(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and the roots of the eigenvalues, falling."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt()


def _diagonal_root(diagonal: Tensor, ridge: float) -> Tensor:
    d = finite(diagonal)
    mean = d.mean() if d.numel() else d.new_zeros(())
    # a dead channel keeps a relative floor, so that dividing by the root stays finite
    return (d + max(ridge, 1e-12) * mean).clamp(min=torch.finfo(d.dtype).tiny).sqrt()
