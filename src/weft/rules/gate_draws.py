"""GateDraws: for every step, which components of an adapter's gated terms take part, and which of them learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from weft.rules.base import Rule, State
from weft.rules.sharded import sharded_like
from weft.seeds import mix
from weft.terms import GatedLowRank
from weft.terms.adapters import find_adapter

__all__ = ["Draw", "GateDraws"]

Draw = Callable[[torch.Generator, int, Sequence[int]], list[tuple[Tensor, Tensor]]]
"""(generator, rank asked for, rank of each term) -> for each term its gate (r,), and which components learn (r,), bool.
"""


class GateDraws(Rule):
    """Draws the gates of step t from a generator seeded by the adapter's seed and t, and writes them into the terms
    before the step's forward passes; they hold for all its micro-batches, and are the same on every process.

    Before the optimizer's step, the gradients of components that do not learn are zero; a term none of whose
    components learns has no gradient, so that neither momentum nor decay moves it.

    Args:
        adapter: its name.
        draw: gives the gates.
    """

    def __init__(self, adapter: str, draw: Draw) -> None:
        self.adapter, self.draw = adapter, draw
        self.step = 0

    def start(self, model: nn.Module) -> None:
        found = find_adapter(model, self.adapter)
        self.terms = [term for term in found.all_terms() if isinstance(term, GatedLowRank)]
        self.seed, self.nominal = found.settings["seed"], found.settings["rank"]
        self._open(1)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for term, learns in zip(self.terms, self.learns, strict=True):
            if not learns.any():
                term.A.grad = term.B.grad = None
                continue
            for parameter, mask in ((term.A, learns.unsqueeze(1)), (term.B, learns)):
                if parameter.grad is not None:
                    mask = mask.to(parameter.device, parameter.dtype).expand(parameter.shape).contiguous()
                    parameter.grad.mul_(sharded_like(mask, parameter))

    def after_step(self, model: nn.Module, step: int) -> None:
        self._open(step + 1)

    def state_dict(self) -> State:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        self._open(int(state["step"]))

    @torch.no_grad()
    def _open(self, step: int) -> None:
        """Set the gates for the forward passes of `step`."""
        self.step = step
        generator = torch.Generator().manual_seed(mix(self.seed, step))
        drawn = self.draw(generator, self.nominal, [term.rank for term in self.terms])
        for term, (gate, _) in zip(self.terms, drawn, strict=True):
            term.draw.copy_(gate)
        self.learns = [learns for _, learns in drawn]
