"""Pivot rows: r rows of a matrix B (out, r) of which all other rows are combinations with small coefficients.

    P B = L U (Gaussian elimination with partial pivoting),   L = [L_1; L_2],   rows below = (L_2 L_1^-1) (rows above)

The entries of L are at most 1, so that in practice those of C = L_2 L_1^-1 are small too.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pivot_rows", "row_order"]


def pivot_rows(B: Tensor) -> tuple[Tensor, Tensor]:
    """order (out,) and C (out - r, r) with B[order[r:]] = C B[order[:r]], in fp64.

    Args:
        B: (out, r), r <= out, any float dtype, of any rank.

    Raises:
        ValueError: more columns than rows, or NaN or infinity.
    """
    rows, r = B.shape
    if r > rows:
        raise ValueError(f"pivot rows need at least as many rows as columns, got {rows} x {r}")
    if not torch.isfinite(B).all():
        raise ValueError("the matrix holds NaN or infinity")
    packed, pivots, _ = torch.linalg.lu_factor_ex(B.double())
    order = row_order(pivots, rows)
    # L alone is inverted, never U: a pivot of zero or of rounding noise does no harm
    lower = packed.tril(-1)
    top = lower[:r] + torch.eye(r, dtype=lower.dtype, device=lower.device)
    C = torch.linalg.solve_triangular(top, lower[r:], upper=False, left=False, unitriangular=True)
    return order, C


def row_order(pivots: Tensor, rows: int) -> Tensor:
    """The rows (rows,) in the order that LAPACK's one-based interchanges (k,) bring them to."""
    order = list(range(rows))
    for i, pivot in enumerate(pivots.tolist()):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    return torch.tensor(order, device=pivots.device, dtype=torch.int64)
