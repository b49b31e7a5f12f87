"""LowRank: T = scale * B A with B (out, r) and A (r, in); r (out + in) stored numbers instead of out * in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.lean_linear import Factor, Part
from weft.kernels.transient_linear import Summand, low_rank_summand
from weft.tensors import owned
from weft.terms.base import Factors, Spec, Term

__all__ = ["LowRank"]


class LowRank(Term):
    """T = scale * B A (Hu et al., 2021, arXiv 2106.09685, for the scale). `scale` is a plain number, saved in the spec.

    Factors of another dtype than the input's (fp32 factors in a bf16 layer) are cast to it on the way: the product is
    computed as the layer is. `dropout` is the probability of zeroing an entry of the input of A while training.
    """

    kind = "low_rank"

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, scale: float = 1.0, dropout: float = 0.0, **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor, *, scale: float = 1.0, dropout: float = 0.0) -> LowRank:
        """The term of given factors B (out, r) and A (r, in)."""
        term = cls(A.shape[1], B.shape[0], A.shape[0], scale=scale, dropout=dropout, device="meta", dtype=A.dtype)
        term.A, term.B = nn.Parameter(owned(A.detach())), nn.Parameter(owned(B.detach()))
        return term

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        hidden = F.linear(x, self.A.to(x.dtype))
        # scaling the rank-r vector costs less than scaling the output
        return F.linear(hidden if self.scale == 1.0 else hidden * self.scale, self.B.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.A.dtype
        return (self.B.to(dtype) @ self.A.to(dtype)) * self.scale

    def exact_factors(self) -> Factors | None:
        return self.B.detach().float() * self.scale, self.A.detach().float()

    def lean_parts(self) -> list[Part] | None:
        return None if self.dropout and self.training else [Factor(self.B, self.A, self.scale)]

    def summand(self) -> Summand | None:
        return None if self.dropout and self.training else low_rank_summand(self.B, self.A, self.scale)

    def spec(self) -> Spec:
        return (
            super().spec()
            | {"rank": self.rank, "scale": self.scale}
            | ({"dropout": self.dropout} if self.dropout else {})
        )
