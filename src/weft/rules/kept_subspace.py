"""KeptSubspace: keeps trained singular components orthogonal to the frozen rest of their weight, and its size as it was
(Effort).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.linalg.svd import truncated_svd
from weft.rules.base import Rule
from weft.rules.scope import beside
from weft.rules.sharded import whole
from weft.terms import Shifted, Spectral

__all__ = ["KeptSubspace", "orthogonality_loss", "size_loss"]

Factors = tuple[Tensor, Tensor, Tensor]
"""U (out, r), s (r,), V (r, in)."""


class KeptSubspace(Rule):
    """Adds, averaged over layers of shifted Spectral terms (Yan et al., 2024, arXiv 2411.15633,
    section 3.3):

        orthogonality * (||[U_main, U]^T [U_main, U] - I||_F + ||[V_main; V] [V_main; V]^T - I||_F) / 2
        norm * | ||W_now||_F^2 - ||W_0||_F^2 |

    The frozen sides U_main, V_main are found by an SVD when training begins and are not saved; with both weights 0
    nothing is computed or held.

    Args:
        orthogonality: weight of the first loss.
        norm: weight of the second.
    """

    works_on = (Shifted,)

    def __init__(self, orthogonality: float, norm: float) -> None:
        self.orthogonality, self.norm = orthogonality, norm
        self._main: dict[str, Factors] = {}

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        self.shifts, self._main = self.found(Shifted), {}
        if not (self.orthogonality or self.norm):
            return
        for layer, term in self.shifts:
            rest = [whole(other.dense(torch.float32)) for other in beside(model, layer, self.terms)]
            weight = sum(rest, start=torch.zeros_like(whole(term.start.dense(torch.float32))))
            main = weight - whole(term.start.dense(torch.float32))
            assert isinstance(term.now, Spectral)
            self._main[layer] = truncated_svd(main, min(main.shape) - term.now.rank)

    def penalty(self, model: nn.Module) -> Tensor | None:
        losses = [self._of(layer, term) for layer, term in self.shifts] if self._main else []
        return torch.stack(losses).mean() if losses else None

    def _of(self, layer: str, term: Shifted) -> Tensor:
        main, now, start = self._main[layer], _factors(term.now), _factors(term.start)
        loss = now[1].new_zeros(())
        if self.orthogonality:
            sides = orthogonality_loss(main[0].mT, now[0].mT) + orthogonality_loss(main[2], now[2])
            loss = loss + self.orthogonality * sides / 2
        return loss + self.norm * size_loss(main, now, start) if self.norm else loss


def _factors(term: nn.Module) -> Factors:
    assert isinstance(term, Spectral)
    return whole(term.U).float(), whole(term.s).float(), whole(term.V).float()


def orthogonality_loss(main: Tensor, V: Tensor) -> Tensor:
    """||[M; V] [M; V]^T - I||_F for M (m, n) of orthonormal rows and V (r, n), without the large Gram matrix:

        ||.||^2 = 2 ||V M^T||^2 + ||V V^T - I||^2

    Smoothed below 1e-4, for the norm has no derivative where it is zero, and that is where it starts.
    """
    square = 2 * (V @ main.mT).square().sum() + (V @ V.mT - torch.eye(len(V), device=V.device)).square().sum()
    return (square + 1e-8).sqrt() - 1e-4


def size_loss(main: Factors, now: Factors, start: Factors) -> Tensor:
    """| ||M + T_now||_F^2 - ||M + T_0||_F^2 | for matrices given by their factors, without building them."""
    return (_inner(now, now) + 2 * _inner(main, now) - _inner(start, start) - 2 * _inner(main, start)).abs()


def _inner(first: Factors, second: Factors) -> Tensor:
    """<U diag(s) V, U' diag(s') V'> in the Frobenius product."""
    left = (first[0] * first[1]).mT @ (second[0] * second[1])
    return (left * (first[2] @ second[2].mT)).sum()
