"""CoreLowRank: T = scale * B R A, a small r x r core between two thin sides, which are usually frozen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.tensors import owned
from weft.terms.base import Factors, Spec, Term

__all__ = ["CoreLowRank"]


class CoreLowRank(Term):
    """T = scale * B R A with B (out, r), R (r, r), A (r, in). Which of the three are trained is the method's
    business."""

    kind = "core_low_rank"

    def __init__(self, in_features: int, out_features: int, rank: int, *, scale: float = 1.0, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.scale = rank, scale
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.R = nn.Parameter(torch.empty(rank, rank, **place))
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))

    @classmethod
    def from_factors(cls, B: Tensor, R: Tensor, A: Tensor, *, scale: float = 1.0) -> CoreLowRank:
        """The term of given factors B (out, r), R (r, r), A (r, in)."""
        term = cls(A.shape[1], B.shape[0], A.shape[0], scale=scale, device="meta", dtype=A.dtype)
        term.B, term.R, term.A = (nn.Parameter(owned(t.detach())) for t in (B, R, A))
        return term

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(F.linear(x, self.A.to(x.dtype)), self.R.to(x.dtype))
        return F.linear(hidden if self.scale == 1.0 else hidden * self.scale, self.B.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.A.dtype
        return (self.B.to(dtype) @ self.R.to(dtype) @ self.A.to(dtype)) * self.scale

    def exact_factors(self) -> Factors | None:
        return self.B.detach().float() @ self.R.detach().float() * self.scale, self.A.detach().float()

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank, "scale": self.scale}
