"""Weight refactorisation: every T steps the factors of each low-rank term are re-balanced by an SVD of their product.

    B A = U diag(s) V,   B <- U sqrt(s),   A <- sqrt(s) V

The product, and so the model's function, stays; the even split minimises the condition number of the factors' Hessian
(Glentis et al., 2025, arXiv 2505.22922, lemma 4.1, T = 200). The optimizer's moments then belong to another basis:
reset them at the same steps (`ResetMoments`).
"""

from __future__ import annotations

import torch
from torch import nn

from weft.linalg.svd import product_factors
from weft.rules.base import Rule
from weft.rules.schedule import in_time
from weft.rules.sharded import sharded_like, whole
from weft.terms import LowRank

__all__ = ["Refactorise"]


class Refactorise(Rule):
    """Re-balances every trainable `LowRank` term after each multiple of `every` steps; sparse terms and scales are left
    alone.
    """

    works_on = (LowRank,)

    def __init__(self, every: int = 200) -> None:
        self.every = every

    def begin(self, model: nn.Module) -> None:
        self.products = [t for _, t in self.found(LowRank) if t.A.requires_grad and t.B.requires_grad]
        in_time(self.every, self.steps, "The interval of refactorisation")

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """The factors of W_t are re-balanced in fp32 and cast back."""
        if step % self.every:
            return
        for term in self.products:
            B, A = product_factors(whole(term.B), whole(term.A))
            if not B.any():  # both factors of a zero product would become zero, and stay so
                continue
            term.B.copy_(sharded_like(B.to(term.B.dtype), term.B))
            term.A.copy_(sharded_like(A.to(term.A.dtype), term.A))
