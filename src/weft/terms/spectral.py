"""Spectral: T = scale * U diag(s) V, U (out, r), s (r,), V (r, in); s is a tensor of its own, to be trained or masked
alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.lean_linear import Factor, Part
from weft.tensors import owned
from weft.terms.base import Factors, Spec, Term
from weft.terms.factors import gated_factors

__all__ = ["Spectral"]


class Spectral(Term):
    """T = scale * U diag(s) V. Orthonormality of U and V is the method's business, not the term's; `scale` and
    `dropout` are as in `LowRank`.
    """

    kind = "spectral"

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, scale: float = 1.0, dropout: float = 0.0, **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.U = nn.Parameter(torch.empty(out_features, rank, **place))
        self.s = nn.Parameter(torch.empty(rank, **place))
        self.V = nn.Parameter(torch.empty(rank, in_features, **place))

    @classmethod
    def from_factors(cls, U: Tensor, s: Tensor, V: Tensor, *, scale: float = 1.0, dropout: float = 0.0) -> Spectral:
        """The term of given factors U (out, r), s (r,), V (r, in)."""
        term = cls(V.shape[1], U.shape[0], s.shape[0], scale=scale, dropout=dropout, device="meta", dtype=U.dtype)
        term.U, term.s, term.V = (nn.Parameter(owned(t.detach())) for t in (U, s, V))
        return term

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        hidden = F.linear(x, self.V.to(x.dtype))
        # under autocast `hidden` is narrower than s: keep the product in its dtype
        hidden = hidden * (self.s if self.scale == 1.0 else self.s * self.scale).to(hidden.dtype)
        return F.linear(hidden, self.U.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.s.dtype
        return (self.U.to(dtype) * (self.s.to(dtype) * self.scale)) @ self.V.to(dtype)

    def exact_factors(self) -> Factors | None:
        return gated_factors(self.U, self.s.detach().float() * self.scale, self.V)

    def lean_parts(self) -> list[Part] | None:
        masked = self.dropout and self.training
        return None if masked else [Factor(self.U, self.s.unsqueeze(1) * self.V, self.scale)]

    def spec(self) -> Spec:
        return (
            super().spec()
            | {"rank": self.rank, "scale": self.scale}
            | ({"dropout": self.dropout} if self.dropout else {})
        )
