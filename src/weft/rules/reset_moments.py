"""Momentum reset: every T steps the optimizer's moments are set to zero, and its bias correction starts anew.

In the benchmark of Glentis et al., 2025, arXiv 2505.22922, the larger part of what restarts gain for factored models (T
= 200).
Deviations: the step counter is reset too, where the paper does not say; otherwise the first steps after a reset would
be far too large, since Adam would take its empty second moment for a settled one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.schedule import in_time
from weft.terms import TrainedFloat

__all__ = ["ResetMoments", "zero_moments"]

_MOMENTS = ("exp_avg", "momentum")  # how their names begin, 8-bit codes and their scales included
_AGES = ("step", "age")  # of a parameter's moments, and of each column's where these come and go


def zero_moments(state: Mapping[str, Any]) -> None:
    """Set a parameter's moments and their ages to zero, in an optimizer's state of it."""
    for name, value in state.items():
        if isinstance(value, Tensor) and (name in _AGES or name.startswith(_MOMENTS)):
            value.zero_()


class ResetMoments(Rule):
    """Zeroes the moments and their ages in the optimizer's state (torch's own, and `weft.optim`'s) after each multiple
    of `every` steps.

    Args:
        terms_only: only parameters of the scope's terms; embeddings and norms keep their moments. Where there are no
            terms, all are reset.
    """

    def __init__(self, every: int, *, terms_only: bool = True) -> None:
        self.every, self.terms_only = every, terms_only

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        in_time(self.every, self.steps, "The interval between two resets of moments")
        if any(isinstance(term, TrainedFloat) for _, term in self.all_terms()):
            raise WeftError(
                "A reset reaches the optimizer's moments alone, and numbers of 8 bits in training have theirs beside "
                "it: leave --reset-moments out, or choose another --method."
            )
        self.mine = {id(parameter) for parameter in self.trained()} if self.terms_only else set()

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Reset, at a multiple of `every`."""
        if step % self.every:
            return
        for parameter, state in self.optimizer.state.items():
            if not self.mine or id(parameter) in self.mine:
                zero_moments(state)
