"""GatedLowRank: T = scale * B diag(gate) A, whose gate is no parameter but set from outside, anew for each step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.lean_linear import Factor, Part
from weft.tensors import owned
from weft.terms.base import Factors, Spec, Term
from weft.terms.factors import gated_factors

__all__ = ["GatedLowRank"]


class GatedLowRank(Term):
    """T = scale * B diag(gate) A with B (out, r), A (r, in), gate (r,).

    In training mode `draw` (r,) stands in the gate's place: a rule writes there which components a step uses (DyLoRA's
    rank, CE-SSL's coin). Evaluation, merging and saving go by `gate`. Both are tensors, so that a compiled forward
    need not be compiled again, and a recomputed one sees what the first saw.
    """

    kind = "gated_low_rank"

    gate: Tensor
    draw: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, *, scale: float = 1.0, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.scale = rank, scale
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))
        self.register_buffer("gate", torch.empty(rank, **place))
        self.register_buffer("draw", torch.empty(rank, **place))

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor, gate: Tensor, *, scale: float = 1.0) -> GatedLowRank:
        """The term of given factors B (out, r), A (r, in) and gate (r,), which is the first draw too."""
        term = cls(A.shape[1], B.shape[0], A.shape[0], scale=scale, device="meta", dtype=A.dtype)
        term.A, term.B = nn.Parameter(owned(A.detach())), nn.Parameter(owned(B.detach()))
        term.gate, term.draw = (gate.detach().to(A.device, A.dtype, copy=True) for _ in range(2))
        return term

    @property
    def now(self) -> Tensor:
        """The gate that a forward pass uses in the present mode: (r,)."""
        return self.draw if self.training else self.gate

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.A.to(x.dtype))
        return F.linear(hidden * (self.now * self.scale).to(hidden.dtype), self.B.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.A.dtype
        return (self.B.to(dtype) * (self.gate.to(dtype) * self.scale)) @ self.A.to(dtype)

    def exact_factors(self) -> Factors | None:
        return gated_factors(self.B, self.gate.detach().float() * self.scale, self.A)

    def lean_parts(self) -> list[Part] | None:
        return [Factor(self.B, self.now.unsqueeze(1) * self.A, self.scale)]

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank, "scale": self.scale}
