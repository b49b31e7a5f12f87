"""Sums of Kronecker products, W (m1 m2, n1 n2) = sum_k s_k U_k (x) V_k with U_k (m1, n1) and V_k (m2, n2): the best one
of each length (Van Loan and Pitsianis, 1993, "Approximation with Kronecker products").

The rearrangement R (m1 n1, m2 n2), R[(i, j), (k, l)] = W[i m2 + k, j n2 + l], makes a Kronecker product of U and V the
outer product of vec U and vec V, so that the SVD of R gives the sum in order of importance.
"""

from __future__ import annotations

import math

from torch import Tensor

from weft.linalg.svd import truncated_svd

__all__ = ["balanced_divisor", "kronecker_sum", "kronecker_svd", "rearrange"]


def kronecker_svd(W: Tensor, left: tuple[int, int], rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (K, m1, n1), s (K,) falling, V (K, m2, n2), for `left` = (m1, n1): divisors of W's sides.

    The U_k are orthonormal in the Frobenius product, the V_k too, and ||W - W_K||_F^2 = sum of s_k^2 beyond K. `rank`
    None gives all min(m1 n1, m2 n2) terms.
    """
    m1, n1 = left
    U, s, V = truncated_svd(rearrange(W, left), rank)
    return U.mT.reshape(-1, m1, n1), s, V.reshape(-1, W.shape[0] // m1, W.shape[1] // n1)


def rearrange(W: Tensor, left: tuple[int, int]) -> Tensor:
    """R (m1 n1, m2 n2) of W (m1 m2, n1 n2), for `left` = (m1, n1)."""
    m1, n1 = left
    blocks = W.reshape(m1, W.shape[0] // m1, n1, W.shape[1] // n1)
    return blocks.transpose(1, 2).reshape(m1 * n1, -1)


def kronecker_sum(U: Tensor, V: Tensor) -> Tensor:
    """sum_k U_k (x) V_k (m1 m2, n1 n2) of U (K, m1, n1) and V (K, m2, n2): the inverse of the rearrangement."""
    (_, m1, n1), (_, m2, n2) = U.shape, V.shape
    R = U.flatten(1).mT @ V.flatten(1)
    return R.view(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)


def balanced_divisor(size: int) -> int:
    """The largest divisor of `size` that is at most its square root."""
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
