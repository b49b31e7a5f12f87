"""ScaledSteps: plain steps of codes that are steps of the weights, whatever the scale (quantization-aware scaling, Lin
et al., 2022, arXiv 2206.15472).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule, State
from weft.terms import SteppedCode

__all__ = ["ScaledSteps"]

_FEW = 1e-4
"""Of all codes: when fewer change in a run, that is worth a word."""


class ScaledSteps(Rule):
    """V <- V - rate (dL/dV) / s^2 of trained `SteppedCode` terms: with W = s (V - zero), W <- W - rate dL/dW.

    The gradient of a code is s times that of its weight, and a step of it is s times a step of the weight: without the
    division steps would be too small by s^2. No momentum and no decay; `rate` falls as the run's learning rate does.
    """

    works_on = (SteppedCode,)

    def __init__(self, rate: float) -> None:
        if rate <= 0:
            raise WeftError(f"rate is {rate}: give the size of plain gradient steps, above 0, such as 0.1.")
        self.rate = rate
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.codes = [term for _, term in self.found(SteppedCode)]
        self._pulls: list[Tensor | None] = []
        self.changed = 0  # codes, counted each time

    def before_step(self, model: nn.Module, step: int) -> None:
        self._pulls = [term.V.grad for term in self.codes]
        for term in self.codes:
            term.V.grad = None  # so that the optimizer leaves it

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for term, G in zip(self.codes, self._pulls, strict=True):
            if G is not None:
                s, before = term.steps().to(G.dtype), term.V.round()
                term.V.sub_(torch.where(s > 0, G / s.square(), 0.0) * (self.rate * self._share()))
                self.changed += int((term.V.round() != before).sum())
        self._pulls = []
        numbers = sum(term.V.numel() for term in self.codes)
        if step == self.steps and self.changed < _FEW * numbers:
            warnings.warn(
                f"{self.changed} of {numbers:,} codes have changed in {step} steps: at few bits half a step is far; "
                f"raise rate above {self.rate:g}, train longer, or take pv-tuning.",
                stacklevel=2,
            )

    def state_dict(self) -> State:
        return {"changed": self.changed}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        self.changed = int(state["changed"])

    def _share(self) -> float:
        """Of the run's first learning rate, what it is now."""
        group = {} if self.optimizer is None else self.optimizer.param_groups[0]
        first = group.get("initial_lr")
        return float(group["lr"]) / float(first) if first else 1.0
