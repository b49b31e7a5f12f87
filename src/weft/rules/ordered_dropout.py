"""OrderedDropout and SuffixLasso: components of a product get an order, and the last ones go (Maestro)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.each_step import EachStep
from weft.rules.schedule import period
from weft.rules.sharded import sharded_like, whole
from weft.rules.support import agreed
from weft.seeds import mix
from weft.terms import GatedLowRank

__all__ = ["OrderedDropout", "SuffixLasso", "tails"]


def tails(columns: Tensor) -> Tensor:
    """||M[:, j:]||_F for every column j of M (n, r): (r,), falling, in fp32 at least."""
    squares = columns.to(torch.promote_types(columns.dtype, torch.float32)).square().sum(0)
    # the root has no slope at zero
    return squares.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


class OrderedDropout(EachStep):
    """In each step one layer, drawn with a rank b, uniformly over all pairs of them, works with its first b components,
    all others with all they have (Horvath et al., 2023, arXiv 2308.14929); and now and then the tails that have become
    unimportant go for good, of trained `GatedLowRank` terms.

    Args:
        threshold: a tail B[:, j:], A[j:] goes when ||B[:, j:]||_F ||A[j:]||_F is at most this share of that of all; the
            first component stays.
        every: steps between two cuts; None for a twentieth of the run, at most 200.
    """

    works_on = (GatedLowRank,)

    def __init__(self, threshold: float, every: int | None = None, seed: int = 0) -> None:
        if not 0 <= threshold < 1:
            raise WeftError(f"threshold is {threshold}: give a share of the layer's importance, from 0 to below 1.")
        self.threshold, self.given, self.seed = threshold, every, seed

    def begin(self, model: nn.Module) -> None:
        self.gated = [term for _, term in self.found(GatedLowRank)]
        what = "The interval between two cuts of ranks (every)"
        self.every = period(self.given, self.steps, share=0.05, most=200, what=what)
        self.open(1)

    def prepare(self, step: int) -> None:
        generator = torch.Generator().manual_seed(mix(self.seed, step))
        ranks = [int(term.gate.count_nonzero()) for term in self.gated]
        place = int(torch.randint(sum(ranks), (), generator=generator))
        for term, rank in zip(self.gated, ranks, strict=True):
            term.draw.copy_(term.gate)
            if 0 <= place < rank:
                term.draw[place + 1 :] = 0.0
            place -= rank

    def after_step(self, model: nn.Module, step: int) -> None:
        if step % self.every == 0:
            self._cut()
        super().after_step(model, step)

    @torch.no_grad()
    def _cut(self) -> None:
        for term in self.gated:
            B, A = whole(term.B), whole(term.A)
            importance = tails(B) * tails(A.mT)
            kept = (importance > self.threshold * importance[0]) & (term.gate > 0)
            kept[0] = True
            gate = agreed(kept.to(term.gate.dtype))
            term.gate.copy_(gate)
            term.B.copy_(sharded_like(B * gate, term.B))
            term.A.copy_(sharded_like(A * gate.unsqueeze(1), term.A))


class SuffixLasso(Rule):
    """Adds lasso * sum over the layers and their components j of ||B[:, j:]||_F + ||A[j:]||_F to the loss, the tails
    that are not gone: a group lasso in which later components are held in more groups.
    """

    works_on = (GatedLowRank,)

    def __init__(self, lasso: float) -> None:
        if lasso < 0:
            raise WeftError(f"lasso is {lasso}: give the weight of the group lasso, 0 or more.")
        self.lasso = lasso

    def begin(self, model: nn.Module) -> None:
        self.gated = [term for _, term in self.found(GatedLowRank)]

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.lasso:
            return None
        sums = [((tails(whole(t.B)) + tails(whole(t.A).mT)) * t.gate).sum() for t in self.gated]
        return self.lasso * torch.stack(sums).sum()
