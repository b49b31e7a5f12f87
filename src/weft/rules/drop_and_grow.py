"""DropAndGrow: now and then, drop the trained entries that moved least and grow as many where the gradient is large
(SpIEL).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.entries import EntryAdamW
from weft.optim.sm3 import SM3
from weft.rules.base import Rule, State
from weft.rules.schedule import in_time, length
from weft.rules.sharded import whole
from weft.rules.support import agreed, lookup, move
from weft.terms import MovingSparse

__all__ = ["DropAndGrow", "GradientProbe", "check_phase"]

_KEPT = ("positions", "total", "squares")


class GradientProbe:
    """Sees the dense gradient of one term, layer by layer in the backward pass, and keeps of it `count` entries.

    The first micro-batch proposes those where it is largest. What later steps have there is summed, as the optimizer
    would see it: accumulated over micro-batches and averaged over processes.
    """

    def __init__(self, term: MovingSparse) -> None:
        self.term, self.steps = term, 0
        self.positions: Tensor | None = None
        # tensors of their own: a checkpoint may not name one storage twice
        zeros = torch.zeros(3, term.nonzeros, device=term.positions.device)
        self.gradient, self.total, self.squares = (row.clone() for row in zeros)
        # one zero that poses as a matrix: its gradient comes as a whole, and is gone when this hook returns
        matrix = self.total.new_zeros(()).expand(term.out_features, term.in_features).detach().requires_grad_()
        matrix.register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]
        term.probe = matrix

    def _see(self, matrix: Tensor) -> None:
        assert matrix.grad is not None
        dense, matrix.grad = matrix.grad.flatten(), None
        if self.positions is None:
            self.positions = dense.abs().topk(self.term.nonzeros, sorted=False).indices.sort().values
        self.gradient = self.gradient + dense[self.positions].float()

    def propose(self) -> None:
        """End of the first step: what the processes propose becomes one choice."""
        # a layer that saw no token proposes nothing new
        own = self.term.positions.long() if self.positions is None else self.positions
        known, inverse = torch.unique(torch.cat(_gathered(own)), return_inverse=True)
        scores = torch.zeros(len(known), device=known.device).index_add_(
            0, inverse, torch.cat(_gathered(self.gradient))
        )
        self.positions = agreed(known[scores.abs().topk(len(own)).indices].sort().values)
        self.gradient = torch.zeros_like(self.total)

    def collect(self) -> None:
        """End of a later step."""
        gradient = torch.stack(_gathered(self.gradient)).mean(0)
        self.total, self.squares = self.total + gradient, self.squares + gradient.square()
        self.gradient, self.steps = torch.zeros_like(self.total), self.steps + 1


class DropAndGrow(Rule):
    """Steps 1 to S of every F form a selection phase; at its end, of k entries, n = floor(p k) of smallest |change| are
    dropped, back to the base's value, and the n best others are grown, from zero (Ansell et al., 2024, arXiv
    2401.16405, algorithm 1).

        p = 1 in the first phase, then rate (1 - t / T)

    "ag": the best are the candidates of largest |summed gradient|; Adam's moments start from the means seen there.
    "ma": those of largest row times column accumulator of SM3.

    Args:
        grow: "ag" or "ma".
        interval: F.
        phase: S, at least 2, for the first of them proposes the candidates; None for 5, or half of a shorter run.
        rate: p at the start.
        steps: T; None for the length of the run.

    Raises WeftError, or warns, where no phase could end before the last step.
    """

    works_on = (MovingSparse,)

    def __init__(
        self,
        grow: str = "ag",
        *,
        interval: int = 20,
        phase: int | None = None,
        rate: float = 0.2,
        steps: int | None = None,
    ) -> None:
        self.grow, self.interval, self.given, self.rate, self.total, self.done = grow, interval, phase, rate, steps, 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.probes: dict[int, GradientProbe] = {}

    def share(self, step: int) -> float:
        """p at the end of the phase that step `step` (from 1) is the last of."""
        if step <= self.interval:
            return 1.0
        return self.rate * max(0.0, 1 - step / self.span)

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.moving = [term for _, term in self.found(MovingSparse)]
        self.span = length(self.steps, "The share of entries that are dropped") if self.total is None else self.total
        self.phase = max(2, min(5, (self.steps or self.span) // 2)) if self.given is None else self.given
        check_phase(self.phase, self.interval)
        in_time(self.phase, self.steps, "The first selection phase (phase)", given=self.given is not None)
        for term in self.moving:
            self._tell(term)
        self._expect(1)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for probe in self.probes.values():
            probe.propose() if (step - 1) % self.interval == 0 else probe.collect()

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        if (step - 1) % self.interval == self.phase - 1:
            for i, term in enumerate(self.moving):
                self._select(term, self.probes.get(i), self.share(step))
        self._expect(step + 1)

    def state_dict(self) -> State:
        state: State = {"done": self.done}
        for i, probe in self.probes.items():
            if probe.positions is not None:
                state |= {f"{i}_{name}": getattr(probe, name) for name in _KEPT} | {f"{i}_steps": probe.steps}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        self._expect(int(state["done"]) + 1)
        for i, term in enumerate(self.moving):
            self._tell(term)
            if f"{i}_steps" in state:
                probe = self.probes[i] = GradientProbe(term)
                probe.steps = int(state[f"{i}_steps"])
                for name in _KEPT:
                    setattr(probe, name, state[f"{i}_{name}"].to(term.positions.device))  # type: ignore[union-attr]

    def _expect(self, step: int) -> None:
        """Make ready for step `step`: probes where a phase begins, none outside."""
        self.done, place = step - 1, (step - 1) % self.interval
        if place == 0 and self.grow == "ag":
            self.probes = {i: GradientProbe(term) for i, term in enumerate(self.moving)}
        elif place >= self.phase:
            self.probes = {}
            for term in self.moving:
                term.probe = None

    def _select(self, term: MovingSparse, probe: GradientProbe | None, share: float) -> None:
        k, size = term.nonzeros, term.out_features * term.in_features
        drop = min(int(share * k), size if self.grow == "ag" else size - k)
        order = whole(term.values.detach()).abs().argsort(stable=True)
        kept = term.positions[order[drop:].sort().values].long()
        grown = self._grown(term, probe, kept, drop)
        state = {} if self.optimizer is None else self.optimizer.state.get(term.values, {})
        new = move(term, agreed(torch.cat([kept, grown])), state, settle=False)
        self._tell(term)
        if probe is not None and isinstance(self.optimizer, EntryAdamW) and new.any():
            assert probe.positions is not None
            total, squares = (
                lookup(probe.positions, sums, term.positions.long())[new] / probe.steps
                for sums in (probe.total, probe.squares)
            )
            slots = new.nonzero().squeeze(1)
            self.optimizer.seed(term.values, slots, total, squares, torch.full_like(slots, probe.steps))

    def _grown(self, term: MovingSparse, probe: GradientProbe | None, kept: Tensor, count: int) -> Tensor:
        """The `count` best positions to grow."""
        if probe is not None:
            assert probe.positions is not None
            free = ~torch.isin(probe.positions, kept)
            return probe.positions[free][probe.total[free].abs().topk(count).indices]
        state = {} if self.optimizer is None else self.optimizer.state.get(term.values, {})
        if "row" not in state:  # another optimizer than the method's: nothing to grow by
            return term.positions[~torch.isin(term.positions.long(), kept)].long()
        scores = torch.outer(state["row"], state["column"]).flatten()
        scores[term.positions.long()] = -1.0
        return scores.topk(count).indices

    def _tell(self, term: MovingSparse) -> None:
        if isinstance(self.optimizer, SM3):
            self.optimizer.place(term.values, term.positions, (term.out_features, term.in_features))


def check_phase(phase: int, interval: int) -> None:
    """Raises WeftError for a selection phase that could propose or judge nothing."""
    if not 2 <= phase <= interval:
        raise WeftError(
            f"A selection phase of {phase} steps every {interval} is not possible: the first step proposes entries and "
            "the others judge them, so give phase= at least 2 and at most interval=."
        )


def _gathered(tensor: Tensor) -> list[Tensor]:
    """The tensor of every process, of one shape on all of them."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found
