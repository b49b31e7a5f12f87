"""Companded: T = a arctan(V / b) entry by entry, V trained in the weight's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.transient_linear import Summand, companded_summand
from weft.terms.base import Term

__all__ = ["Companded"]


class Companded(Term):
    """T = a arctan(V / b) with V (out, in) and a = exp(log_a), b = exp(log_b), one number each, above zero (Weight
    Compander, Eliasen et al., 2023, arXiv 2306.16993).

    No entry exceeds a pi / 2. T and its slope are made for the moment, in forward and in backward; V alone is kept.
    """

    kind = "companded"
    lean_alone = True

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.V = nn.Parameter(torch.empty(out_features, in_features, **place))
        self.log_a = nn.Parameter(torch.empty(1, **place))
        self.log_b = nn.Parameter(torch.empty(1, **place))

    @classmethod
    def from_matrix(cls, W: Tensor, a: float, b: float) -> Companded:
        """V = b tan(W / a), the term of a matrix whose entries lie within a pi / 2; those that do not are cut to 0.99
        of it.
        """
        term = cls(W.shape[1], W.shape[0], device=W.device, dtype=W.dtype)
        angle = (W.double() / a).clamp(-0.99 * torch.pi / 2, 0.99 * torch.pi / 2)
        with torch.no_grad():
            term.V.copy_(b * angle.tan())
            for parameter, value in ((term.log_a, a), (term.log_b, b)):
                parameter.fill_(value).log_()
        return term

    @classmethod
    def example(cls, generator: torch.Generator) -> Companded:
        """A small one of random numbers."""
        return cls.from_matrix(torch.randn(12, 8, generator=generator) * 0.1, 0.3, 0.2)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        V, log_a, log_b = (t.to(dtype or t.dtype) for t in (self.V, self.log_a, self.log_b))
        return log_a.exp() * torch.atan(V / log_b.exp())

    def summand(self) -> Summand:
        return companded_summand(self.V, self.log_a, self.log_b)
