"""Proximal: after each step the gates of an adapter's rank-one components are shrunk towards zero, and stay there
exactly (SoRA).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.sharded import whole
from weft.terms import Spectral
from weft.terms.adapters import find_adapter

__all__ = ["Proximal", "released_threshold", "soft_threshold"]


class Proximal(Rule):
    """g <- sign(g) max(|g| - xi, 0) after the optimizer's step, the proximal step of xi |g|_1 (Ding et al., 2023, arXiv
    2311.11696), for the vectors `s` of the adapter's trained Spectral terms.

    Args:
        adapter: its name.
        xi: the threshold, or a list of thresholds, each kept for `every` steps, the last one to the end.
        by_rate: multiply xi by the gate's learning rate, as the proximal gradient step for a fixed penalty does.
        penalty: factor of the mean of |g| over all gates, added to the loss.
        released: the operator of the released code instead, see `released_threshold`.
    """

    def __init__(
        self,
        adapter: str,
        *,
        xi: float | Sequence[float],
        every: int | None = None,
        by_rate: bool = False,
        penalty: float = 0.0,
        released: bool = False,
    ) -> None:
        self.adapter, self.every, self.by_rate, self.factor = adapter, every, by_rate, penalty
        self.thresholds = tuple(xi) if isinstance(xi, Sequence) else (xi,)
        self.operator = released_threshold if released else soft_threshold
        self.optimizer: torch.optim.Optimizer | None = None
        if not self.thresholds or min(self.thresholds) < 0:
            raise WeftError(f"The threshold xi is {xi}; give a number from 0 on, or a list of such numbers.")
        if len(self.thresholds) > 1 and (every is None or every < 1):
            raise WeftError("A list of thresholds xi needs every=, the steps that each of them is kept.")

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def threshold(self, step: int) -> float:
        """xi at step `step` (from 1)."""
        place = (step - 1) // self.every if self.every else 0
        return self.thresholds[min(place, len(self.thresholds) - 1)]

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.factor:
            return None
        gates = [whole(gate) for gate in self._gates(model)]
        return self.factor * torch.stack([gate.abs().sum() for gate in gates]).sum() / sum(g.numel() for g in gates)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        xi = self.threshold(step)
        for gate in self._gates(model):
            gate.copy_(self.operator(gate, xi * self._rate(gate) if self.by_rate else xi))

    def _gates(self, model: nn.Module) -> list[nn.Parameter]:
        terms = find_adapter(model, self.adapter).all_terms()
        return [term.s for term in terms if isinstance(term, Spectral) and term.s.requires_grad]

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
