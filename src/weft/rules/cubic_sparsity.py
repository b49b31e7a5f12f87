"""CubicSparsity: the share of entries that are zero rises by a cubic law (Zhu and Gupta, 2017, arXiv 1710.01878; as in
movement pruning, Sanh et al., 2020, arXiv 2005.07683).
"""

from __future__ import annotations

from torch import nn

from weft.errors import WeftError
from weft.rules.each_step import EachStep
from weft.rules.schedule import length
from weft.terms.scored_mask import ScoredMask

__all__ = ["CubicSparsity"]


class CubicSparsity(EachStep):
    """Sets what trained `ScoredMask` terms keep, round((1 - v_t) out in), for each step t = 1 ... T:

        v_t = v (1 - (1 - (t - t_i) / (T - t_i - t_f))^3),   0 up to t_i, v in the last t_f steps

    Args:
        sparsity: v, from 0 to below 1.
        dense, settle: t_i and t_f as shares of the run, below 1 together; one step at least is at v.
    """

    works_on = (ScoredMask,)
    ends = "the whole sparsity"

    def __init__(self, sparsity: float, dense: float, settle: float) -> None:
        if not 0 <= sparsity < 1:
            raise WeftError(f"sparsity is {sparsity}: give the share of the entries that go, from 0 to below 1.")
        if min(dense, settle) < 0 or dense + settle >= 1:
            raise WeftError(f"dense is {dense} and settle {settle}: give two shares of the run, below 1 together.")
        self.sparsity, self.dense, self.settle = sparsity, dense, settle

    def begin(self, model: nn.Module) -> None:
        self.masked = [term for _, term in self.found(ScoredMask)]
        steps = length(self.steps, "The rise of the sparsity")
        self.first, self.last = int(self.dense * steps), steps - max(1, int(self.settle * steps))
        self.open(1)

    def at(self, step: int) -> float:
        """v_t at step `step` (from 1)."""
        if step > self.last:
            return self.sparsity
        passed = max(step - self.first, 0) / max(self.last - self.first + 1, 1)
        return self.sparsity * (1 - (1 - passed) ** 3)

    def prepare(self, step: int) -> None:
        for term in self.masked:
            term.kept = round((1 - self.at(step)) * term.W.numel())
