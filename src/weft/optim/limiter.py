"""Fira's norm-growth limiter, used by APOLLO too: a term's norm may fall freely and grow by at most gamma a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.optim.base import Field, Matrix, Rows, Scalar, State

__all__ = ["NormGrowth"]


@dataclass(frozen=True)
class NormGrowth:
    """S <- S / c with c = max(||S||_F / (q + 1e-8), gamma) / gamma, q the limited norm of the last step.

    State: q, one number a weight. Source: Chen et al. 2024 (Fira), arXiv 2410.01623.
    Deviations: a norm of zero is not remembered, since the official rule would then hold the term near zero for some
    1,850 steps.
    """

    gamma: float = 1.01

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"norm": Field((), torch.promote_types(matrix.dtype, torch.float32))}

    def factor(self, E: Tensor | Sequence[Tensor], f: Scalar, state: State, rows: Rows) -> Tensor:
        """1/c (k, 1, 1) for the term f * E (k, n, s); remembers the limited norm."""
        norm = rows.norm(_row_norms(E) * f)
        last = state["norm"].to(norm.dtype)[:, None, None]
        most = (last + 1e-8) * self.gamma
        factor = torch.where(last > 0, most / torch.maximum(norm, most), 1.0)
        limited = norm * factor
        state["norm"].copy_(torch.where(limited > 0, limited, last).flatten())
        return factor


def _row_norms(E: Tensor | Sequence[Tensor]) -> Tensor:
    """(k, n, 1) in fp32 or fp64."""
    if not isinstance(E, Tensor):
        return torch.stack([_row_norms(one) for one in E])
    high = torch.promote_types(E.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(E, dim=-1, keepdim=True, dtype=high)
    return norms
