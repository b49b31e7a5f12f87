"""Truncate: every m steps each trained matrix becomes its truncated SVD, the kept values a little smaller (TRP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.linalg.spectrum import rank_for_energy
from weft.linalg.svd import truncated_svd, widen
from weft.rules.base import Rule
from weft.rules.schedule import period
from weft.rules.sharded import sharded_like, whole
from weft.rules.support import agreed
from weft.terms import Dense

__all__ = ["Truncate", "truncated"]


def truncated(W: Tensor, energy: float, nuclear: float = 0.0) -> Tensor:
    """U_k diag(s_k - tau)_+ V_k of a matrix (out, in), k the smallest rank that holds `energy` of sum s^2, tau
    `nuclear` times the mean of the kept s: a truncation and a step along the nuclear norm's sub-gradient U_k V_k.
    """
    U, s, V = truncated_svd(widen(W))
    k = rank_for_energy(s, energy)
    kept = (s[:k] - nuclear * s[:k].mean()).clamp(min=0) if k else s[:k]
    return (U[:, :k] * kept) @ V[:k]


class Truncate(Rule):
    """Truncates trained `Dense` terms after steps m, 2 m, ..., the last step left out (Xu et al., 2018, arXiv
    1812.02402). The optimizer's moments stay.

    Args:
        energy: T, the share of the squared singular values that each truncation keeps.
        nuclear: the pull, as a share of the mean kept singular value, at each truncation.
        every: m; None for a tenth of the run, at most 200.
    """

    works_on = (Dense,)

    def __init__(self, energy: float, nuclear: float, every: int | None = None) -> None:
        if not 0 < energy <= 1 or not 0 <= nuclear < 1:
            raise WeftError(
                f"energy is {energy} and nuclear {nuclear}: give the share of the squared singular values that is "
                "kept, above 0, up to 1, and the share that the kept ones lose, from 0 to below 1."
            )
        self.energy, self.nuclear, self.given = energy, nuclear, every

    def begin(self, model: nn.Module) -> None:
        self.matrices = [term.matrix for _, term in self.found(Dense)]
        what = "The interval between two truncations (every)"
        self.every = period(self.given, self.steps, share=0.1, most=200, what=what)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """In fp32 at least, cast back."""
        if step % self.every or step == self.steps:
            return
        for matrix in self.matrices:
            low = agreed(truncated(whole(matrix), self.energy, self.nuclear).contiguous())
            matrix.copy_(sharded_like(low.to(matrix.dtype), matrix))
