"""Factored: the base of the terms T = scale * B A whose two factors are made from other numbers at each call."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.kernels.lean_linear import Factor, Part
from weft.terms.base import Factors, Spec, Term

__all__ = ["Factored"]


class Factored(Term):
    """T = scale * B A with B (out, r), A (r, in) from `factors()`: combined from a random basis (NOLA), gathered from
    a pool (MoS), quantised (one-bit adapters). A plain LoRA of rank r at any moment, hence written as one.

    Args:
        scale: a plain number, saved in the spec.
        dropout: probability of zeroing an entry of x while training.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.scale, self.dropout = rank, scale, dropout

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in), differentiable, computed in `dtype` (None: the stored one)."""
        raise NotImplementedError(f"{type(self).__name__} gives no factors")  # abstract

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.factors()
        hidden = F.linear(F.dropout(x, self.dropout, self.training), A.to(x.dtype))
        return F.linear(hidden if self.scale == 1.0 else hidden * self.scale, B.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        B, A = self.factors(dtype)
        return (B @ A) * self.scale

    def exact_factors(self) -> Factors | None:
        B, A = _gathered(self).factors(torch.float32)
        return B.detach() * self.scale, A.detach()

    def lean_parts(self) -> list[Part] | None:
        return None if self.dropout and self.training else [Factor(*self.factors(), self.scale)]

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}


def _gathered(term: Factored) -> Factored:
    """The term itself, or where FSDP2 has sharded its parameters a twin of whole ones: communicates."""
    if not any(isinstance(p, DTensor) for p in term.parameters()):
        return term
    twin = copy.copy(term)
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in term.named_parameters()}
    twin._parameters = {name: nn.Parameter(p.detach()) for name, p in whole.items()}
    return twin
