"""SampledVectors: which singular vectors are trained, drawn anew now and then, the larger values more often (SST)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.linalg.svd import truncated_svd, widen
from weft.rules.base import Rule
from weft.rules.reset_moments import zero_moments
from weft.rules.schedule import period
from weft.rules.sharded import sharded_like, whole
from weft.rules.support import agreed
from weft.seeds import mix
from weft.terms.sampled_spectral import SampledSpectral

__all__ = ["SampledVectors", "drawn"]


def drawn(s: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """`rank` different places of s (m,), drawn one after another by p = (1 / m + s / sum s) / 2: (rank,), rising."""
    s = s.detach().double().cpu()
    p = 0.5 / len(s) + 0.5 * s / s.sum().clamp(min=torch.finfo(s.dtype).tiny)
    return torch.multinomial(p, rank, generator=generator).sort().values


class SampledVectors(Rule):
    """Of trained `SampledSpectral` terms (Zhao et al., 2024, arXiv 2405.15481):

        before a step    the gradients of vectors lose the factor s, which would starve those of small values
        after it         s <- max(s, 0), and trained vectors get length 1
        every T3 steps   the vectors go back, others are drawn, with moments of zero
        every m / r of these   an SVD of the whole makes the vectors orthogonal again

    Args:
        every: T3; None for the run's share that lets m / r draws fit in it, at most 200.
    """

    works_on = (SampledSpectral,)

    def __init__(self, every: int | None = None, seed: int = 0) -> None:
        self.given, self.seed = every, seed
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.sampled = [term for _, term in self.found(SampledSpectral)]
        share = min(term.rank / len(whole(term.s)) for term in self.sampled)
        self.round = max(1, round(1 / share))
        what = "The interval between two draws of vectors (every)"
        # where all vectors are trained, half a run brings one draw, which clears moments and no more
        self.every = period(self.given, self.steps, share=min(share, 0.5), most=200, what=what)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for term in self.sampled:
            s = whole(term.s)[term.active]
            inverse = torch.where(s > 0, 1 / s, torch.zeros_like(s))
            for parameter, factor in ((term.P, inverse), (term.Q, inverse.unsqueeze(1))):
                if parameter.grad is not None:
                    parameter.grad.mul_(sharded_like(factor.expand(parameter.shape).contiguous(), parameter))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for i, term in enumerate(self.sampled):
            term.s.clamp_(min=0)
            P, Q = whole(term.P), whole(term.Q)
            P, Q = nn.functional.normalize(P, dim=0), nn.functional.normalize(Q, dim=1)
            if step % self.every == 0 and step != self.steps:
                generator = torch.Generator().manual_seed(mix(self.seed, step, i))
                P, Q = self._swap(term, P, Q, generator, step // self.every % self.round == 0)
            term.P.copy_(sharded_like(P.contiguous(), term.P))
            term.Q.copy_(sharded_like(Q.contiguous(), term.Q))

    def _swap(
        self, term: SampledSpectral, P: Tensor, Q: Tensor, generator: torch.Generator, orthogonal: bool
    ) -> tuple[Tensor, Tensor]:
        """Put the trained vectors back, and give those that are trained next."""
        term.U.index_copy_(1, term.active, P)
        term.V.index_copy_(0, term.active, Q)
        if orthogonal:
            U, s, V = truncated_svd(widen(term.U * whole(term.s)) @ widen(term.V))
            for kept, value in ((term.U, U), (term.V, V)):
                kept.copy_(agreed(value.contiguous()))
            term.s.copy_(sharded_like(agreed(s.contiguous()).to(term.s.dtype), term.s))
            self._forget(term.s)
        term.active.copy_(agreed(drawn(whole(term.s), term.rank, generator).to(term.active.device)))
        P, Q = term.U[:, term.active].clone(), term.V[term.active].clone()
        term.U.index_fill_(1, term.active, 0.0)
        self._forget(term.P, term.Q)
        return P, Q

    def _forget(self, *parameters: nn.Parameter) -> None:
        for parameter in parameters:
            if self.optimizer is not None and parameter in self.optimizer.state:
                zero_moments(self.optimizer.state[parameter])
