"""The inverse of an empirical Fisher matrix of m gradients, without a d x d matrix (M-FAC).

    F = lam I + (1/k) sum_i g_i g_i^T,   G (m, d) the gradients as rows,   K = G G^T (m, m),   k rows of G are filled

- A row of the window (dynamic form): F^-1 g_j = G^T c with c = (lam I + K / k)^-1 e_j. Nothing is subtracted, so fp32
  gradients give fp32 accuracy; x / lam - (...) of the general product loses ||g||^2 / (k lam) times that.
- All at once (static form), in blocks of b neighbours: F^-1 = (I - Y^T Y) / lam with Y = L^-1 G and
  L L^T = k lam I + K, from which products take O(d m) and the diagonal too.

The order of the rows does not matter, so a ring buffer needs no sorting, and rows of zeros change nothing but k.
Source: Frantar, Kurtic and Alistarh, 2021, arXiv 2107.03356.
Deviations: Cholesky for its LU without pivoting and its recursion, which give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["InverseFisher", "inverse_fisher", "window_coefficients", "window_combination", "window_dots"]

_PIECE = {"cpu": 1 << 18, "cuda": 1 << 25}  # entries of G converted at a time


def window_dots(G: Tensor, g: Tensor) -> Tensor:
    """G g (m,) in fp64, for G (m, d) in any dtype: a Gram matrix of fp32 products need not be positive definite."""
    total = torch.zeros(len(G), dtype=torch.float64, device=G.device)
    for columns in _pieces(G):
        total += G[:, columns].double() @ g[columns].double()
    return total


def window_combination(G: Tensor, c: Tensor) -> Tensor:
    """G^T c (d,) in fp32, or fp64 for fp64 rows: the sum of the rows of G (m, d) with the weights c (m,).

    Summed in fp64: among rows that are near-copies of each other the weights are large and cancel.
    """
    out = torch.empty(G.shape[1], dtype=torch.promote_types(G.dtype, torch.float32), device=G.device)
    for columns in _pieces(G):
        out[columns] = (c.double() @ G[:, columns].double()).to(out.dtype)
    return out


def window_coefficients(gram: Tensor, count: int, damping: float, row: int) -> Tensor:
    """c (m,) fp64 with F^-1 g_row = G^T c, from K (m, m) and the number k of gradients that F is the mean of.

    The damping is at least 4 units of fp64's rounding of the trace, below which K is noise. Raises
    torch.linalg.LinAlgError for NaN in K.
    """
    S = gram.double() / count
    S.diagonal().add_(damping + 4 * torch.finfo(S.dtype).eps * S.diagonal().sum())
    unit = torch.zeros(len(S), 1, dtype=S.dtype, device=S.device)
    unit[row] = 1.0
    return torch.cholesky_solve(unit, torch.linalg.cholesky(S)).squeeze(1)


class InverseFisher(NamedTuple):
    """F^-1 = (I - Y^T Y) / damping of each block, and products with it."""

    reduced: Tensor  # Y (blocks, m, b), in the last block padded with zeros
    damping: float
    size: int  # d

    def product(self, x: Tensor) -> Tensor:
        """F^-1 x for x (d,)."""
        parts = _cut(x.to(self.reduced.dtype).unsqueeze(0), self.reduced.shape[2])
        inside = (parts @ self.reduced.mT) @ self.reduced
        return ((parts - inside) / self.damping).flatten()[: self.size]

    def diagonal(self) -> Tensor:
        """[F^-1]_qq for every weight q: (d,), all positive."""
        return ((1 - self.reduced.square().sum(1)) / self.damping).flatten()[: self.size]


def inverse_fisher(gradients: Tensor, damping: float, block: int | None = None) -> InverseFisher:
    """The inverse Fisher matrix of all rows of `gradients` (m, d), dense or block-diagonal.

    Args:
        damping: lam, in units of a squared gradient entry.
        block: b: weights are cut into runs of b neighbours that are independent of each other (the paper's pruner takes
            128); None for one block.

    Computed in fp64 and kept in the dtype of the gradients (fp32 at least): d m numbers. Differences 1 - sum(Y^2) lose
    ||g||^2 / (m lam) units of rounding; give fp64 gradients where that is too much.

    Raises ValueError for gradients that are no matrix or hold NaN or infinity, and damping or block sizes not above 0.
    """
    if gradients.dim() != 2 or not torch.isfinite(gradients).all():
        raise ValueError(f"gradients are a finite matrix (count, weights), got {tuple(gradients.shape)}")
    if not damping > 0 or (block is not None and block < 1):
        raise ValueError(f"damping and block are above 0, got {damping} and {block}")
    kept = torch.promote_types(gradients.dtype, torch.float32)
    m, d = gradients.shape
    blocks = _cut(gradients, max(1, min(block or d, d)))
    at_once = max(1, _PIECE.get(gradients.device.type, 1 << 25) // (m * (m + blocks.shape[2])))
    return InverseFisher(
        torch.cat([_reduced(part, damping).to(kept) for part in torch.split(blocks, at_once)]), damping, d
    )


def _reduced(blocks: Tensor, damping: float) -> Tensor:
    """Y (blocks, m, b) in fp64."""
    G = blocks.double()
    S = G @ G.mT
    S.diagonal(dim1=1, dim2=2).add_(damping * G.shape[1])
    return torch.linalg.solve_triangular(torch.linalg.cholesky(S), G, upper=False)


def _cut(rows: Tensor, b: int) -> Tensor:
    """(m, d) -> (ceil(d / b), m, b), padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % b))
    return padded.reshape(len(rows), -1, b).transpose(0, 1)


def _pieces(G: Tensor) -> Iterator[slice]:
    width = max(1, _PIECE.get(G.device.type, 1 << 25) // max(1, len(G)))
    return (slice(start, start + width) for start in range(0, G.shape[1], width))
