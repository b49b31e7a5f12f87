"""RankDecay: a low-rank product beside codes in training that loses half its rank after another, until nothing is left
(QVGen, Huang et al., 2025, arXiv 2505.11497).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from weft.errors import WeftError, unknown
from weft.linalg.svd import product_factors
from weft.rules.each_step import EachStep
from weft.rules.reset_moments import zero_moments
from weft.rules.schedule import length
from weft.terms import AidedCode

__all__ = ["SHAPES", "RankDecay"]

SHAPES = ("cosine", "straight")


class RankDecay(EachStep):
    """Closes the gates of trained `AidedCode` terms in phases of T steps, one a halving of the rank: r, r/2 ... 1.

        the first floor(R/2) components of a phase's R stay open; of the others
        gate(t) = (1 + cos(pi t / T)) / 2 ("cosine"), or 1 - t / T ("straight"),   t = 0, 1 ... T - 1

    After a phase what is left is ordered again, B = U sqrt(s), A = sqrt(s) V of its product, and the moments of both
    factors begin anew. T is the length of the run by the number of phases.

    Args:
        auxiliary: r of the product at first, 1 or more; a smaller matrix has less and begins later to lose it.
        decay: the shape of the gate's fall.
    """

    works_on = (AidedCode,)
    ends = "codes without a product beside them"

    def __init__(self, auxiliary: int, decay: str) -> None:
        if auxiliary < 1:
            raise WeftError(f"auxiliary is {auxiliary}: give the rank of the product that goes away, 1 or more.")
        if decay not in SHAPES:
            raise unknown("fall of the auxiliary rank", decay, SHAPES)
        self.first, self.shape = auxiliary, decay
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.aided = [term for _, term in self.found(AidedCode)]
        steps, phases = length(self.steps, "The decay of the auxiliary rank"), self.first.bit_length()
        if steps < phases:
            raise WeftError(
                f"A rank of {self.first} goes in {phases} phases, and the run has {steps} steps; train longer, or give "
                "a smaller auxiliary."
            )
        self.period = steps // phases
        self.open(1)

    def at(self, step: int) -> tuple[int, float]:
        """(R, gate of the half that goes) at step `step` (from 1)."""
        phase, t = divmod(step - 1, self.period)
        done = t / self.period
        return self.first >> phase, (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done

    def prepare(self, step: int) -> None:
        rank, share = self.at(step)
        for term in self.aided:
            term.gate.zero_()
            term.gate[:rank] = share
            term.gate[: rank // 2] = 1.0

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """At the end of a phase: order what stays, and forget what goes."""
        if step % self.period == 0:
            for term in self.aided:
                self._cut(term, self.at(step + 1)[0])
        super().after_step(model, step)

    def _cut(self, term: AidedCode, rank: int) -> None:
        B, A = product_factors(term.B[:, :rank], term.A[:rank]) if rank and term.rank else (term.B[:, :0], term.A[:0])
        for parameter, kept in ((term.B, B), (term.A.mT, A.mT)):
            parameter.zero_()
            parameter[:, : kept.shape[1]] = kept.to(parameter.dtype)
        for parameter in (term.B, term.A):
            if self.optimizer is not None:
                zero_moments(self.optimizer.state.get(parameter, {}))
