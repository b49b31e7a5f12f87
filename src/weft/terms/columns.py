"""Columns: T is zero but for r of its columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.column_linear import column_linear
from weft.terms.base import Factors, Spec, Term

__all__ = ["Columns"]


class Columns(Term):
    """T[:, columns] = scale * B with B (out, r), all other columns zero; the columns are fixed, distinct and rising.

    Equal to the LoRA of B and the rows of the identity that `columns` names, but of x only those r channels are read,
    and kept for the backward pass.
    """

    kind = "columns"
    lean_alone = True

    def __init__(self, in_features: int, out_features: int, rank: int, *, scale: float = 1.0, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.scale = rank, scale
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))
        self.register_buffer("columns", torch.empty(rank, device=place.get("device"), dtype=torch.int32))
        self.columns: Tensor

    @classmethod
    def from_columns(cls, B: Tensor, columns: Tensor, in_features: int, *, scale: float = 1.0) -> Columns:
        """The term of given columns: B (out, r), `columns` (r,) in any order, distinct."""
        term = cls(in_features, B.shape[0], B.shape[1], scale=scale, device="meta", dtype=B.dtype)
        columns, order = columns.sort()
        term.B = nn.Parameter(B.detach()[:, order].contiguous())
        term.columns = columns.to(B.device, torch.int32)
        return term

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.B, self.columns, self.scale)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        B = self.B.to(dtype or self.B.dtype) * self.scale
        return B.new_zeros(self.out_features, self.in_features).index_copy(1, self.columns.long(), B)

    def exact_factors(self) -> Factors | None:
        A = torch.zeros(self.rank, self.in_features, device=self.columns.device)
        return self.B.detach().float() * self.scale, A.scatter_(1, self.columns.long().unsqueeze(1), 1.0)

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank, "scale": self.scale}
