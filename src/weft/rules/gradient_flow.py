"""GradientFlow: N:M sparsity that comes slowly, by a factor on what is pruned or by patterns that tighten."""

from __future__ import annotations

import math

from torch import nn

from weft.errors import WeftError, unknown
from weft.rules.each_step import EachStep
from weft.rules.schedule import length
from weft.terms.fading import Fading

__all__ = ["DECAYS", "GradientFlow", "patterns"]

DECAYS = ("exponential", "linear", "stepwise", "geometric")
LEFT = 1e-3
"""What the exponential factor comes down to before it is set to zero."""


def patterns(n: int, m: int, decay: str) -> list[tuple[int, int]]:
    """The patterns (N, M) that a schedule goes through, the last one n of m.

    "stepwise": m - 1, m / 2, m / 4 ... n of m. "geometric": 8 n of 8 m, 4 n of 4 m, 2 n of 2 m, n of m. Others have
    the one.
    """
    if decay == "stepwise":
        halves = [m >> i for i in range(1, m.bit_length()) if m >> i > n]
        return [(kept, m) for kept in dict.fromkeys([m - 1, *halves, n]) if kept >= n]
    if decay == "geometric":
        return [(n * i, m * i) for i in (8, 4, 2, 1)]
    return [(n, m)]


class GradientFlow(EachStep):
    """Sets pattern and beta of trained `Fading` terms for each step (Bambhaniya et al., 2024, arXiv 2402.04744).

        dense     the first share of the steps, beta = 1
        decay     beta falls from 1 to 1e-3 ("exponential") or to 0 ("linear");
                  or beta = 0, and the patterns change at equal intervals ("stepwise", "geometric")
        settle    the last share of the steps, one at least, beta = 0 and n of m

    Args:
        n, m: the pattern in the end.
        dense, settle: shares of the run, below 1 together.
    """

    works_on = (Fading,)
    ends = "the pattern"

    def __init__(self, n: int, m: int, decay: str, dense: float, settle: float) -> None:
        if decay not in DECAYS:
            raise unknown("decay of the gradient flow", decay, DECAYS)
        if min(dense, settle) < 0 or dense + settle >= 1:
            raise WeftError(f"dense is {dense} and settle {settle}: give two shares of the run, below 1 together.")
        self.n, self.m, self.decay, self.dense, self.settle = n, m, decay, dense, settle

    def begin(self, model: nn.Module) -> None:
        self.fading = [term for _, term in self.found(Fading)]
        steps = length(self.steps, "The decay of the gradient flow")
        self.first, self.last = int(self.dense * steps), steps - max(1, int(self.settle * steps))
        self.open(1)

    def at(self, step: int) -> tuple[int, int, float]:
        """(N, M, beta) at step `step` (from 1)."""
        if step <= self.first:
            return self.n, self.m, 1.0
        if step > self.last:
            return self.n, self.m, 0.0
        passed, decaying = step - self.first, self.last - self.first
        if self.decay == "exponential":
            return self.n, self.m, math.exp(math.log(LEFT) * passed / decaying)
        if self.decay == "linear":
            return self.n, self.m, 1 - passed / decaying
        stages = patterns(self.n, self.m, self.decay)
        return (*stages[(passed - 1) * len(stages) // decaying], 0.0)

    def prepare(self, step: int) -> None:
        n, m, beta = self.at(step)
        for term in self.fading:
            term.n, term.m = n, m
            term.beta.fill_(beta)
