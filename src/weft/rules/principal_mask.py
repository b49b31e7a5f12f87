"""PrincipalMask: the trained entries are those where the weight's rank-f approximation is largest, chosen anew every T
steps (LIFT).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.linalg.subspace import randomized_svd
from weft.linalg.svd import truncated_svd
from weft.rules.base import Rule
from weft.rules.sharded import whole
from weft.rules.support import agreed, move, moving_terms
from weft.terms import MovingSparse
from weft.terms.adapters import base_terms

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
        adapter: its name.
        rank: f, of the approximation.
        interval: T; 0 for the first choice for good.
        randomized: the SVD by random projections, much cheaper on large matrices.
    """

    def __init__(self, adapter: str, *, rank: int, interval: int, randomized: bool) -> None:
        self.adapter, self.rank, self.interval, self.randomized = adapter, rank, interval, randomized
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        if not self.interval or step % self.interval:
            return
        generator = torch.Generator().manual_seed(step)
        for layer, term in moving_terms(model, self.adapter).items():
            weight: Tensor = sum(whole(base.dense(torch.float32)) for base in base_terms(model, layer).values())  # type: ignore[assignment]
            weight = weight + _change(term)
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
