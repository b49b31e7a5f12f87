"""Proximal: after each step the gates of rank-one components are shrunk towards zero, and stay there
exactly (SoRA).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.schedule import in_time, length
from weft.rules.sharded import whole
from weft.terms import Spectral

__all__ = ["Proximal", "released_threshold", "soft_threshold"]


_PUBLISHED = 3e-4
_CLOSES_30 = 0.385  # P(|g| < 0.385) = 0.3 for a standard normal g


class Proximal(Rule):
    """g <- sign(g) max(|g| - xi, 0) after the optimizer's step, the proximal step of xi |g|_1 (Ding et al., 2023, arXiv
    2311.11696), for the vectors `s` of trained Spectral terms.

    Args:
        xi: the threshold, or a list of thresholds, each kept for `every` steps, the last one to the end. None for 3e-4
            as published, or 0.385 / N in a run of N < 1284 steps, in which 3e-4 would do nothing: a standard normal
            gate that learns nothing then closes by the end with probability 0.3, the share that the paper closes.
        every: None for equal shares of the run.
        by_rate: multiply xi by the gate's learning rate, as the proximal gradient step for a fixed penalty does.
        penalty: factor of the mean of |g| over all gates, added to the loss.
        released: the operator of the released code instead, see `released_threshold`.
    """

    def __init__(
        self,
        xi: float | Sequence[float] | None = None,
        *,
        every: int | None = None,
        by_rate: bool = False,
        penalty: float = 0.0,
        released: bool = False,
    ) -> None:
        self.every, self.by_rate, self.factor = every, by_rate, penalty
        self.given = tuple(xi) if isinstance(xi, Sequence) else () if xi is None else (xi,)
        self.operator = released_threshold if released else soft_threshold
        self.optimizer: torch.optim.Optimizer | None = None
        if xi is not None and (not self.given or min(self.given) < 0):
            raise WeftError(f"The threshold xi is {xi}; give a number from 0 on, or a list of such numbers.")
        if every is not None and every < 1:
            raise WeftError(f"every is {every}: each threshold xi is kept for 1 step or more.")

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.gates = [term.s for _, term in self.found(Spectral) if term.s.requires_grad]
        self.thresholds = self.given or (max(_PUBLISHED, _CLOSES_30 / length(self.steps, "The threshold xi")),)
        self.kept, count = self.every, len(self.thresholds)
        if count > 1:
            self.kept = self.every or max(1, length(self.steps, "A list of thresholds") // count)
            in_time(self.kept * (count - 1), self.steps, "The start of the last threshold of xi (every)")

    def threshold(self, step: int) -> float:
        """xi at step `step` (from 1)."""
        place = (step - 1) // self.kept if self.kept else 0
        return self.thresholds[min(place, len(self.thresholds) - 1)]

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.factor:
            return None
        gates = [whole(gate) for gate in self.gates]
        return self.factor * torch.stack([gate.abs().sum() for gate in gates]).sum() / sum(g.numel() for g in gates)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        xi = self.threshold(step)
        for gate in self.gates:
            gate.copy_(self.operator(gate, xi * self._rate(gate) if self.by_rate else xi))

    def _rate(self, gate: nn.Parameter) -> float:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        for group in groups:
            if any(parameter is gate for parameter in group["params"]):
                return float(group["lr"])
        raise WeftError("The threshold follows the learning rate, and no optimizer of the gates is bound to the rule.")


def soft_threshold(g: Tensor, xi: float) -> Tensor:
    """sign(g) max(|g| - xi, 0)."""
    return g.sign() * (g.abs() - xi).clamp(min=0)


def released_threshold(g: Tensor, xi: float) -> Tensor:
    """Shrink by xi, then zero what is then below xi: unlike the soft threshold, all |g| up to 2 xi become 0."""
    shrunk = soft_threshold(g, xi)
    return torch.where(shrunk.abs() < xi, torch.zeros_like(shrunk), shrunk)
