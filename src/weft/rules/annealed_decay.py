"""AnnealedDecay: decoupled weight decay of a scope's matrices that falls along a cosine (SoMA, Yun et
al., 2024, arXiv 2412.04077).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from weft.rules.base import Rule
from weft.rules.schedule import length, peak_rate

__all__ = ["AnnealedDecay"]


class AnnealedDecay(Rule):
    """w <- (1 - lr_t decay_t) w after each step, for the trained matrices.

        decay_t = last + (decay - last) (1 + cos(pi t / N)) / 2,   lr_t = lr (1 - t / N)^power

    Args:
        decay: at the start; 0 for no decay at all.
        steps: N; None for the length of the run.
        lr: the peak learning rate; None for the optimizer's.
    """

    def __init__(
        self, decay: float, *, steps: int | None = None, lr: float | None = None, last: float = 1e-5, power: float = 0.9
    ) -> None:
        self.decay, self.total, self.lr, self.last, self.power = decay, steps, lr, last, power
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.matrices = [parameter for parameter in self.trained() if parameter.dim() > 1]
        if self.decay:
            self.span = length(self.steps, "The annealed weight decay") if self.total is None else self.total
            self.peak = peak_rate(self.optimizer, self.matrices, "The annealed decay") if self.lr is None else self.lr

    def shrink(self, step: int) -> float:
        """The share of a weight that step `step` (from 1) takes away."""
        if not self.decay:
            return 0.0
        done = min((step - 1) / self.span, 1.0)
        decay = self.last + (self.decay - self.last) * (1 + math.cos(math.pi * done)) / 2
        return float(self.peak * (1 - done) ** self.power * decay)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        shrink = self.shrink(step)
        for matrix in self.matrices if shrink else ():
            matrix.mul_(1 - shrink)
