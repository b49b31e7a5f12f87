"""EachStep: what a rule sets before the forward passes of each step, from the step's number alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.rules.base import Rule, State

__all__ = ["EachStep"]


class EachStep(Rule):
    """A rule whose `prepare(step)` runs before the forward passes of that step; it holds for all micro-batches, and an
    interrupted run goes on with the very step. `begin` has to end in `self.open(1)`.
    """

    step = 0

    def prepare(self, step: int) -> None:
        """Set the terms for the forward passes of `step` (from 1)."""
        raise NotImplementedError  # abstract

    @torch.no_grad()
    def open(self, step: int) -> None:
        """`prepare`, and remember the step."""
        self.step = step
        self.prepare(step)

    def after_step(self, model: nn.Module, step: int) -> None:
        self.open(step + 1)

    def state_dict(self) -> State:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        self.open(int(state["step"]))
