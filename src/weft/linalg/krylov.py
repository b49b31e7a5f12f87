"""The leading eigenvectors of a symmetric positive semi-definite matrix G, without those that nobody asked for.

Block Krylov iteration: from a random block X the spans of X, G X, G^2 X ... are collected in one orthonormal basis Q,
and the eigenvectors of Q^T G Q are taken for those of G. When the basis is full it starts anew from its best vectors
(a thick restart), which keeps what has been found. What G adds beyond the basis is the residual, which bounds the angle
between the span that was found and the true one, so that the iteration knows when it is done:

    sin(angle) <= ||G u - l u|| / (l_r - l_(r+1))

Sources: Golub and Underwood, 1977 (block Lanczos); Wu and Simon, 2000 (thick restart); Musco and Musco, 2015, arXiv
1504.05477 (why a random block is a good start); Davis and Kahan, 1970 (the bound).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["block_size", "leading_eigenvectors", "leading_eigh", "worthwhile"]

_SMALLEST = 256  # below this size a dense decomposition takes milliseconds
_FIRST = 3  # products before it is looked for the first time whether they suffice
_MOST = 60  # products


def block_size(rank: int) -> int:
    """Vectors that are multiplied at once: a few more than are asked for, which converge first what lies beneath."""
    return rank + 8


def worthwhile(size: int, rank: int) -> bool:
    """Whether `rank` directions of a space of this size are few enough to be looked for by themselves."""
    return size >= _SMALLEST and 16 * block_size(rank) <= size


def leading_eigh(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues (rank,), falling, and eigenvectors (n, rank) of G (n, n), in fp64.

    G is symmetric and positive semi-definite but for rounding. Iterated where that is quicker, else dense.
    """
    G = matrix.double()
    found = None
    if worthwhile(len(G), rank):
        found = leading_eigenvectors(lambda x: x @ G, len(G), rank, device=G.device)
    if found is not None:
        return found[0], found[1].mT
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank]


def leading_eigenvectors(
    apply: Callable[[Tensor], Tensor], size: int, rank: int, *, device: torch.device, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor] | None:
    """Values (rank,), falling, and vectors as rows (rank, size), in fp64; None where they do not converge.

    Args:
        apply: rows x (k, size) in fp64 -> x G.
        tolerance: of the angle, in radians, between the span of the vectors and the true one. Where l_r and l_(r+1)
            are within a hundredth of each other, as much of the residual is allowed as if they were a hundredth apart;
            the values, whose errors are the squares of the residuals, are exact to 1e-10 all the same.

    The start is drawn from a fixed seed: the same matrix gives the same answer. Values below 1e-10 of the largest are
    rounding, and count as not converged.
    """
    block = block_size(rank)
    start = torch.randn(block, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    Q = last = _orthonormal(start)  # the basis, as rows
    inside = Q.new_zeros(0, 0)  # Q G Q^T
    for products in range(1, _MOST + 1):
        image = apply(last)
        cross = image @ Q.mT
        inside = _bordered(inside, cross)
        beyond = image - cross @ Q  # G of all other blocks lies in the basis
        if products >= _FIRST:
            values, vectors = torch.linalg.eigh(inside)
            values, vectors = values.flip(0), vectors.flip(1)
            residual = (vectors[-block:, :rank].mT @ beyond).norm(dim=1).amax()
            if not bool(values[rank - 1] > 1e-10 * values[0]):  # also for NaN
                return None
            gap = (values[rank - 1] - values[rank]).clamp(min=1e-2 * values[rank - 1])
            if bool(residual <= tolerance * torch.maximum(gap, 1e-9 * values[0])):
                return values[:rank], vectors[:, :rank].mT @ Q
            if len(Q) + block > min(size // 3, 8 * block):
                Q, inside = vectors[:, : 2 * block].mT @ Q, values[: 2 * block].diag()
        last = _orthonormal(beyond - (beyond @ Q.mT) @ Q)
        last = _orthonormal(last - (last @ Q.mT) @ Q)  # again, for rows that were rounding where the range is exhausted
        Q = torch.cat([Q, last])
    return None


def _orthonormal(rows: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(rows.mT).Q.mT.contiguous()
    return Q


def _bordered(inside: Tensor, cross: Tensor) -> Tensor:
    """The matrix with the rows and columns of the last block added: cross (block, all)."""
    block, known = len(cross), len(inside)
    out = cross.new_empty(known + block, known + block)
    out[:known, :known] = inside
    out[known:], out[:, known:] = cross, cross.mT
    corner = cross[:, known:]
    out[known:, known:] = (corner + corner.mT) / 2
    return out
