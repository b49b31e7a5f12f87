"""AnnealedDecay: decoupled weight decay of an adapter that falls along a cosine (SoMA)."""

from __future__ import annotations

import math

import torch
from torch import nn

from weft.rules.base import Rule
from weft.terms.adapters import find_adapter

__all__ = ["AnnealedDecay"]


class AnnealedDecay(Rule):
    """w <- (1 - lr_t decay_t) w after each step, for the trained matrices of an adapter.

        decay_t = last + (first - last) (1 + cos(pi t / N)) / 2,   lr_t = lr (1 - t / N)^power

    Args:
        adapter: its name.
        steps: N, the length of the run; None for no decay at all.
        lr: the peak learning rate.
    """

    def __init__(self, adapter: str, *, steps: int | None, lr: float, first: float, last: float, power: float) -> None:
        self.adapter, self.steps, self.lr = adapter, steps, lr
        self.first, self.last, self.power = first, last, power

    def shrink(self, step: int) -> float:
        """The share of a weight that step `step` (from 1) takes away."""
        if self.steps is None:
            return 0.0
        done = min((step - 1) / self.steps, 1.0)
        decay = self.last + (self.first - self.last) * (1 + math.cos(math.pi * done)) / 2
        return float(self.lr * (1 - done) ** self.power * decay)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        shrink = self.shrink(step)
        if not shrink:
            return
        for _, parameter in find_adapter(model, self.adapter).named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(1 - shrink)
