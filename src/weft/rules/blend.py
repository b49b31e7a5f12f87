"""Blend: rounding that comes slowly, a share of the difference it makes, from none to all."""

from __future__ import annotations

from torch import nn

from weft.errors import WeftError
from weft.rules.each_step import EachStep
from weft.rules.schedule import length
from weft.terms import TernaryLatent

__all__ = ["Blend"]


class Blend(EachStep):
    """blend = min(1, (t - 1) / (share N)) of trained `TernaryLatent` terms at step t = 1, 2 ... N
    (the lambda of warm-ups to ternary weights; none in Ma et al., 2024, arXiv 2402.17764).

    Args:
        blend: that share of the run, below 1; 0 rounds from the first step on.
    """

    works_on = (TernaryLatent,)
    ends = "whole rounding"

    def __init__(self, blend: float) -> None:
        if not 0 <= blend < 1:
            raise WeftError(f"blend is {blend}: give the share of the run in which rounding comes, from 0, below 1.")
        self.share = blend
        if not blend:
            self.ends = ""

    def begin(self, model: nn.Module) -> None:
        self.latents = [term for _, term in self.found(TernaryLatent)]
        self.rising = int(self.share * length(self.steps, "The blending in of rounding")) if self.share else 0
        self.open(1)

    def at(self, step: int) -> float:
        """The blend at step `step` (from 1)."""
        return min(1.0, (step - 1) / self.rising) if self.rising else 1.0

    def prepare(self, step: int) -> None:
        for term in self.latents:
            term.blend.fill_(self.at(step))
