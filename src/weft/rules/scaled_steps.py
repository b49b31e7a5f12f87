"""ScaledSteps: plain steps of codes that are steps of the weights, whatever the scale (quantization-aware scaling, Lin
et al., 2022, arXiv 2206.15472).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.terms import SteppedCode

__all__ = ["ScaledSteps"]


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

    def before_step(self, model: nn.Module, step: int) -> None:
        self._pulls = [term.V.grad for term in self.codes]
        for term in self.codes:
            term.V.grad = None  # so that the optimizer leaves it

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for term, G in zip(self.codes, self._pulls, strict=True):
            if G is not None:
                s = term.steps().to(G.dtype)
                term.V.sub_(torch.where(s > 0, G / s.square(), 0.0) * (self.rate * self._share()))
        self._pulls = []

    def _share(self) -> float:
        """Of the run's first learning rate, what it is now."""
        group = {} if self.optimizer is None else self.optimizer.param_groups[0]
        first = group.get("initial_lr")
        return float(group["lr"]) / float(first) if first else 1.0
