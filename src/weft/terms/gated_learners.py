"""GatedLearners: factors in N parts that are added one after another, and a gate that says for each token how many
(ACM, Wojcik et al., 2023, arXiv 2312.10193).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from weft.errors import WeftError
from weft.terms.base import Spec, Term

__all__ = ["GatedLearners"]

TEMPERATURE = 0.8
"""Of the soft draws, as published."""


class GatedLearners(Term):
    """T(x) = sum_{n <= k(x)} B_n A_n x, with k = argmax of w2 relu(w1 x + b1) + b2 from 0 to N.

    B_n (out, r/N) and A_n (r/N, in) are the n-th part of B's columns and of A's rows. Without gradients a learner runs
    on the tokens that chose it alone. In training, `runs` is set from outside: those "chosen", "all", or as many as are
    "drawn" (Gumbel), with the gradient of the soft draw. It has no matrix: `dense` raises.

    Args:
        rank: r, a multiple of N.
        learners: N.
        hidden: width of the gate.

    Raises:
        WeftError: a rank that is no multiple.
    """

    kind = "gated_learners"
    linear: ClassVar[bool] = False
    runs = "chosen"

    def __init__(
        self, in_features: int, out_features: int, rank: int, learners: int, hidden: int, **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        if learners < 1 or rank % learners:
            raise WeftError(f"{learners} learners do not share a rank of {rank}; give a multiple.")
        self.rank, self.learners, self.hidden = rank, learners, hidden
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))
        self.w1 = nn.Parameter(torch.empty(hidden, in_features, **place))
        self.b1 = nn.Parameter(torch.empty(hidden, **place))
        self.w2 = nn.Parameter(torch.empty(learners + 1, hidden, **place))
        self.b2 = nn.Parameter(torch.empty(learners + 1, **place))

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor, learners: int, hidden: int, generator: Generator) -> GatedLearners:
        """Of B (out, r), A (r, in), best components first, with a gate that chooses all learners."""
        term = cls(A.shape[1], len(B), len(A), learners, hidden, device=A.device, dtype=A.dtype)
        with torch.no_grad():
            term.A.copy_(A)
            term.B.copy_(B)
            term.w1.copy_(torch.randn(term.w1.shape, generator=generator) / A.shape[1] ** 0.5)
            for zeros in (term.b1, term.w2, term.b2):
                zeros.zero_()
            term.b2[-1] = 1.0
        return term

    @classmethod
    def example(cls, generator: Generator) -> GatedLearners:
        """One of three learners whose gate chooses different ones."""
        B, A = torch.randn(12, 6, generator=generator), torch.randn(6, 8, generator=generator)
        term = cls.from_factors(B, A, 3, 5, generator)
        nn.init.normal_(term.w2, generator=generator)
        term.b2.data.zero_()
        return term

    def gate(self, x: Tensor) -> Tensor:
        """Logits (..., N + 1) of the choices 0 to N."""
        inner = F.relu(F.linear(x, self.w1.to(x.dtype), self.b1.to(x.dtype)))
        return F.linear(inner, self.w2.to(inner.dtype), self.b2.to(inner.dtype))

    def forward(self, x: Tensor) -> Tensor:
        how = self.runs if self.training else "chosen"
        if how == "all":
            return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        if how == "drawn":
            draws = F.gumbel_softmax(self.gate(x).float(), tau=TEMPERATURE, hard=True)
            return self.masked(x, at_least(draws).to(x.dtype))
        chosen = self.gate(x).argmax(-1)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_meta:
            return self.masked(x, (chosen.unsqueeze(-1) >= self.steps(x)).to(x.dtype))
        return self.grouped(x, chosen)

    def steps(self, x: Tensor) -> Tensor:
        """1 ... N."""
        return torch.arange(1, self.learners + 1, device=x.device)

    def masked(self, x: Tensor, run: Tensor) -> Tensor:
        """Every learner on every token, times run (..., N)."""
        z = F.linear(x, self.A.to(x.dtype))
        parts = z.unflatten(-1, (self.learners, -1)) * run.to(z.dtype).unsqueeze(-1)  # type: ignore[no-untyped-call]
        return F.linear(parts.flatten(-2), self.B.to(z.dtype))

    def grouped(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Every learner on the tokens that chose it or a later one; chosen (...)."""
        rows, chosen = x.reshape(-1, self.in_features), chosen.flatten()
        parts = zip(torch.chunk(self.A, self.learners), torch.chunk(self.B, self.learners, 1), strict=True)
        total: Tensor | None = None
        for n, (A, B) in enumerate(parts, 1):
            places = (chosen >= n).nonzero().squeeze(1)
            y = F.linear(F.linear(rows[places], A.to(rows.dtype)), B.to(rows.dtype))
            total = y.new_zeros(len(rows), self.out_features) if total is None else total
            total = total.index_add(0, places, y)
        assert total is not None
        return total.view(*x.shape[:-1], self.out_features)

    def lacking(self, x: Tensor) -> Tensor:
        """What each choice 0 ... N lacks of all learners, as a share of the square of what these give: (..., N + 1)."""
        z, gram = F.linear(x, self.A.to(x.dtype)), self.B.mT @ self.B
        keep = torch.ones(self.learners + 1, self.learners, device=x.device, dtype=z.dtype).tril(-1)
        tails = [z * (1 - row).repeat_interleave(self.rank // self.learners) for row in keep]
        energy = torch.stack([((tail @ gram.to(z.dtype)) * tail).sum(-1) for tail in tails], -1)
        return energy / energy[..., :1].clamp(min=1e-30)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        raise WeftError(
            "A layer whose rank follows the token is no matrix: it cannot be merged, and no other format holds it; "
            "keep the weft directory, which transformers opens after `import weft`."
        )

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank, "learners": self.learners, "hidden": self.hidden}


def at_least(shares: Tensor) -> Tensor:
    """Shares (..., N + 1) of the choices -> (..., N), that of n or more for n = 1 ... N."""
    return shares.flip(-1).cumsum(-1).flip(-1)[..., 1:]
