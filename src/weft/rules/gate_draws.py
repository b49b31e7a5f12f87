"""GateDraws: for every step, which components of gated terms take part, and which of them learn (DyLoRA, Valipour et
al., 2022, arXiv 2210.07558; CE-SSL, Zhou et al., 2024, arXiv 2406.14377).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from weft.rules.each_step import EachStep
from weft.rules.sharded import sharded_like
from weft.seeds import mix
from weft.terms import GatedLowRank

__all__ = ["Draw", "GateDraws"]

Draw = Callable[[torch.Generator, int, Sequence[int]], list[tuple[Tensor, Tensor]]]
"""(generator, rank asked for, rank of each term) -> for each term its gate (r,), and which components learn (r,), bool.
"""


class GateDraws(EachStep):
    """Draws the gates of step t from a generator seeded by `seed` and t, and writes them into the terms
    before the step's forward passes; they hold for all its micro-batches, and are the same on every process.

    Before the optimizer's step, the gradients of components that do not learn are zero; a term none of whose
    components learns has no gradient, so that neither momentum nor decay moves it.

    Args:
        draw: gives the gates.
        rank: that was asked for; None for the largest of the terms.
    """

    works_on = (GatedLowRank,)

    def __init__(self, draw: Draw, *, rank: int | None = None, seed: int = 0) -> None:
        self.draw, self.rank, self.seed = draw, rank, seed

    def begin(self, model: nn.Module) -> None:
        self.gated = [term for _, term in self.found(GatedLowRank)]
        self.nominal = max(term.rank for term in self.gated) if self.rank is None else self.rank
        self.open(1)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for term, learns in zip(self.gated, self.learns, strict=True):
            if not learns.any():
                term.A.grad = term.B.grad = None
                continue
            for parameter, mask in ((term.A, learns.unsqueeze(1)), (term.B, learns)):
                if parameter.grad is not None:
                    mask = mask.to(parameter.device, parameter.dtype).expand(parameter.shape).contiguous()
                    parameter.grad.mul_(sharded_like(mask, parameter))

    def prepare(self, step: int) -> None:
        generator = torch.Generator().manual_seed(mix(self.seed, step))
        drawn = self.draw(generator, self.nominal, [term.rank for term in self.gated])
        for term, (gate, _) in zip(self.gated, drawn, strict=True):
            term.draw.copy_(gate)
        self.learns = [learns for _, learns in drawn]
