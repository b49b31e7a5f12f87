"""PrincipalMask: the trained entries are those where the weight's rank-f approximation is largest, chosen anew every T
steps (LIFT).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.linalg.subspace import randomized_svd
from weft.linalg.svd import truncated_svd
from weft.rules.base import Rule
from weft.rules.schedule import period
from weft.rules.scope import beside
from weft.rules.sharded import whole
from weft.rules.support import agreed, move
from weft.terms import MovingSparse

__all__ = ["PrincipalMask", "principal_entries"]


def principal_entries(
    weight: Tensor, rank: int, count: int, *, randomized: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """The `count` flat positions at which |U_f diag(s_f) V_f| of `weight` (out, in) is largest: (count,) int64, rising.

    Args:
        rank: f; at most min(out, in), where the approximation is the weight itself.
        randomized: by a randomised SVD with f further vectors, drawn from `generator`.
    """
    if randomized:
        assert generator is not None
        U, s, V = randomized_svd(weight.float(), rank, oversample=rank, generator=generator)
    else:
        U, s, V = truncated_svd(weight.float(), rank)
    low = (U * s) @ V
    return low.abs_().flatten().topk(count, sorted=False).indices.sort().values


class PrincipalMask(Rule):
    """Chooses the entries again after steps T, 2 T, ..., from W + delta as it then is (Liu et al., 2025, arXiv
    2506.00772, algorithm 1). Entries that leave stay as they are; the moments of those that stay go on.

    Args:
        filter_rank: f, of the approximation.
        interval: T; None for a fifth of the run, at most 400; 0 for the first choice for good.
        randomized: the SVD by random projections, much cheaper on large matrices.
    """

    works_on = (MovingSparse,)

    def __init__(self, filter_rank: int, *, interval: int | None = None, randomized: bool = False) -> None:
        self.rank, self.interval, self.randomized = filter_rank, interval, randomized
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.moving = self.found(MovingSparse)
        what = "The interval between two choices of entries (interval)"
        self.every = 0 if self.interval == 0 else period(self.interval, self.steps, share=0.2, most=400, what=what)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        if not self.every or step % self.every or step == self.steps:
            return
        generator = torch.Generator().manual_seed(step)
        for layer, term in self.moving:
            rest = [whole(other.dense(torch.float32)) for other in beside(model, layer, self.terms)]
            weight = sum(rest, start=_change(term))
            chosen = principal_entries(
                weight, self.rank, term.nonzeros, randomized=self.randomized, generator=generator
            )
            state = self.optimizer.state.get(term.values, {}) if self.optimizer else {}
            move(term, agreed(chosen), state, settle=True)


def _change(term: MovingSparse) -> Tensor:
    """The term's matrix, in fp32; also where its values are sharded."""
    values = torch.cat([whole(term.values.detach()), term.settled]).float()
    flat = values.new_zeros(term.out_features * term.in_features)
    flat[torch.cat([term.positions, term.settled_positions]).long()] = values
    return flat.view(term.out_features, term.in_features)
