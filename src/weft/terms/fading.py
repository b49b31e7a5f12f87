"""Fading: T = V * (m + beta (1 - m)), m keeping the N largest of every M entries in a row (N:M sparsity that comes
slowly).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.kernels.transient_linear import Summand
from weft.terms.base import Spec, Term

__all__ = ["Fading", "largest_of"]


def largest_of(W: Tensor, n: int, m: int) -> Tensor:
    """(out, in) bool: exactly the n entries of largest magnitude in each m neighbours of a row, whatever is equal."""
    groups = W.detach().abs().reshape(W.shape[0], -1, m)
    kept = groups.topk(n, -1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).view(W.shape)


class Fading(Term):
    """T = V * (m + beta (1 - m)) with V (out, in) stored and trained whole, m anew from V in every forward pass, beta
    from 1 (dense) to 0 (n of m) set from outside (Bambhaniya et al., 2024, arXiv 2402.04744).

    Evaluation goes by beta = 0, which is what will be left. Neither m nor T is kept for the backward pass.

    Args:
        straight: the gradient of T goes to V as it is (straight through), in place of through the factor beta.
    """

    kind = "fading"
    lean_alone = True
    beta: Tensor

    def __init__(
        self, in_features: int, out_features: int, n: int, m: int, *, straight: bool = False, **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        self.n, self.m, self.straight = n, m, straight
        self.V = nn.Parameter(torch.empty(out_features, in_features, **place))
        self.register_buffer("beta", torch.empty(1, **place))

    @classmethod
    def from_matrix(cls, W: Tensor, n: int, m: int, *, straight: bool = False) -> Fading:
        """The term of a matrix (out, in) whose beta is 1."""
        term = cls(W.shape[1], W.shape[0], n, m, straight=straight, device=W.device, dtype=W.dtype)
        with torch.no_grad():
            term.V.copy_(W)
            term.beta.fill_(1.0)
        return term

    @classmethod
    def example(cls, generator: Generator) -> Fading:
        """A small one of random numbers, half faded."""
        term = cls.from_matrix(torch.randn(12, 8, generator=generator), 2, 4)
        term.beta.fill_(0.5)
        return term

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        V = self.V.to(dtype or self.V.dtype)
        faded = V * _factor(V, self._beta().to(V.dtype), self.n, self.m)
        return V + (faded - V).detach() if self.straight else faded

    def summand(self) -> Summand:
        add = partial(_add, n=self.n, m=self.m)
        pull = partial(_pull, n=self.n, m=self.m, straight=self.straight)
        return Summand(add, pull, 1.0, (self.V, self._beta()))

    def spec(self) -> Spec:
        return super().spec() | {"n": self.n, "m": self.m} | ({"straight": True} if self.straight else {})

    def _beta(self) -> Tensor:
        return self.beta if self.training else torch.zeros_like(self.beta)


def _factor(V: Tensor, beta: Tensor, n: int, m: int) -> Tensor:
    kept = largest_of(V, n, m)
    return torch.where(kept, torch.ones_like(beta), beta)


def _add(W: Tensor, scale: float, V: Tensor, beta: Tensor, *, n: int, m: int) -> None:
    W.addcmul_(V, _factor(V, beta, n, m), value=scale)


def _pull(G: Tensor, scale: float, V: Tensor, beta: Tensor, *, n: int, m: int, straight: bool) -> tuple[Tensor, None]:
    return (G if straight else G * _factor(V, beta, n, m)) * scale, None
