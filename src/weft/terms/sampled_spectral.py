"""SampledSpectral: T = U diag(s) V whole, of whose singular vectors only some are trained at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from weft.kernels.transient_linear import Summand, worthwhile
from weft.terms.base import Spec, Term

__all__ = ["SampledSpectral"]


class SampledSpectral(Term):
    """T = U diag(s) V + P diag(s[active]) Q with U (out, m), V (m, in), s (m,), P (out, r), Q (r, in), active (r,).

    s, P and Q are trained, and the columns of U that P stands for are zero (Sparse Spectral Training, Zhao et al.,
    2024, arXiv 2405.15481).

    Many tokens meet one product with the matrix, built for the moment; few tokens one a factor.
    """

    kind = "sampled_spectral"
    lean_alone = True
    U: Tensor
    V: Tensor
    active: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.rank, m = rank, min(in_features, out_features)
        self.s = nn.Parameter(torch.empty(m, **place))
        self.P = nn.Parameter(torch.empty(out_features, rank, **place))
        self.Q = nn.Parameter(torch.empty(rank, in_features, **place))
        self.register_buffer("U", torch.empty(out_features, m, **place))
        self.register_buffer("V", torch.empty(m, in_features, **place))
        self.register_buffer("active", torch.empty(rank, device=place.get("device"), dtype=torch.int64))

    @classmethod
    def from_svd(cls, U: Tensor, s: Tensor, V: Tensor, active: Tensor) -> SampledSpectral:
        """The term of U (out, m), s (m,), V (m, in), the vectors `active` (r,) of which are trained."""
        term = cls(V.shape[1], U.shape[0], len(active), device=U.device, dtype=U.dtype)
        with torch.no_grad():
            term.s.copy_(s)
            term.U.copy_(U)
            term.V.copy_(V)
            term.active.copy_(active)
            places = active.to(U.device)
            term.P.copy_(U[:, places])
            term.Q.copy_(V[places])
            term.U.index_fill_(1, places, 0.0)
        return term

    @classmethod
    def example(cls, generator: Generator) -> SampledSpectral:
        """A small one of random numbers."""
        U, V = (torch.randn(*shape, generator=generator) for shape in ((12, 8), (8, 8)))
        return cls.from_svd(U, torch.rand(8, generator=generator), V, torch.tensor([5, 2, 7]))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, self.in_features)
        if torch.compiler.is_compiling() or worthwhile(rows, self.out_features, self.in_features):
            return super().forward(x)
        s, U, V, P, Q = (t.to(x.dtype) for t in (self.s, self.U, self.V, self.P, self.Q))
        rest = F.linear(F.linear(x, V) * s, U)
        return rest + F.linear(F.linear(x, Q) * s[self.active], P)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        s, U, V, P, Q = (t.to(dtype or t.dtype) for t in (self.s, self.U, self.V, self.P, self.Q))
        return (U * s) @ V + (P * s[self.active]) @ Q

    def builds(self, x: Tensor) -> bool:
        return True

    def summand(self) -> Summand:
        return Summand(_add, _pull, 1.0, (self.s, self.P, self.Q, self.U, self.V, self.active))

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank}


def _add(W: Tensor, scale: float, s: Tensor, P: Tensor, Q: Tensor, U: Tensor, V: Tensor, active: Tensor) -> None:
    W.addmm_(U * s, V, alpha=scale).addmm_(P * s[active], Q, alpha=scale)


def _pull(
    G: Tensor, scale: float, s: Tensor, P: Tensor, Q: Tensor, U: Tensor, V: Tensor, active: Tensor
) -> tuple[Tensor | None, ...]:
    mine, weights = P.mT @ G, s[active].unsqueeze(1)
    by_s = ((U.mT @ G) * V).sum(1).index_add_(0, active, (mine * Q).sum(1))
    return by_s * scale, (G @ Q.mT) * (weights.mT * scale), mine * (weights * scale), None, None, None
