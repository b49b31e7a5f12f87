"""loldu: train r entries of the diagonal of a pivoted LU decomposition of the weight (Shi et al., 2024, arXiv
2410.13618, section 3).

    W = P L D U,  L unit lower, U unit upper triangular;   W + s P L_r diag(z - D_r) U_r,  z from D_r,  s = alpha / r;
    r trainable numbers

Trained is z - D_r: the start is exact and the base keeps its bytes, where the reference writes a residual into it (for
small r that is larger than W). P L_r is stored with its rows permuted, so there is no P. A pivot that is zero, or tiny
beside its row, would blow U up: such a row is divided by its largest entry instead, which leaves every component of W
as it is. Only P is orthogonal, not L and U. `start` is the paper's choice of z: "lu" (D_r), or "uniform", "normal",
"constant", "ones", "zeros", which do not start at the base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import unknown
from weft.linalg.pivoting import row_order
from weft.linalg.svd import widen
from weft.methods.adapter import scale_of
from weft.methods.base import Method, Site, Split
from weft.methods.svfit import diagonal_count, trained_diagonal

__all__ = ["METHOD", "first", "ldu", "split"]

STARTS = ("lu", "uniform", "normal", "constant", "ones", "zeros")


def split(site: Site, *, alpha: float | None, start: str) -> Split:
    """The change of the diagonal, between the triangular sides."""
    L, D, U = ldu(site.weight(torch.float64))
    L, D, U = L[:, : site.rank], D[: site.rank], U[: site.rank]
    change = first(start, D, site.generator) - D
    return Split({"": trained_diagonal(site, scale_of(site.nominal, alpha=alpha) * L, change, U)})


def ldu(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P L (out, k), D (k,), U (k, in) with W = P L diag(D) U, k = min(out, in), by LU with partial pivoting."""
    W = widen(W)
    packed, pivots, _ = torch.linalg.lu_factor_ex(W)
    size = min(W.shape)
    L, U = packed[:, :size].tril(-1), packed[:size].triu()
    L.diagonal().fill_(1)
    largest = U.abs().amax(1)
    pivot = U.diagonal()
    D = torch.where(pivot.abs() > 1e-6 * largest, pivot, largest)
    D = torch.where(D == 0, torch.ones_like(D), D)
    return L[row_order(pivots, len(W)).argsort()], D, U / D.unsqueeze(1)


def first(start: str, D: Tensor, generator: torch.Generator) -> Tensor:
    """z at the start, for each of the reference's choices."""
    mean = D.mean()
    if start == "lu":
        return D
    if start == "uniform":
        return mean.abs() * (torch.rand(len(D), generator=generator).to(D) - 0.5)
    if start == "normal":
        return mean + D.std() * torch.randn(len(D), generator=generator).to(D)
    if start not in ("constant", "ones", "zeros"):
        raise unknown("start of loldu", start, STARTS)
    return torch.full_like(D, {"ones": 1.0, "zeros": 0.0}.get(start, float(mean)))


METHOD = Method(
    name="loldu",
    kind="adapt",
    summary="Entries of the diagonal of the weight's LU decomposition trained alone, between the triangular factors.",
    paper="Shi et al., 2024, arXiv 2410.13618",
    split=split,
    count=diagonal_count,
    defaults={"alpha": 8.0, "start": "lu"},
)
