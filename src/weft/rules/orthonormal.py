"""Orthonormal: a pull of singular vectors towards orthonormality, added to the gradients after clipping (SORSA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.rules.base import Rule
from weft.rules.sharded import sharded_like, whole
from weft.terms import Spectral
from weft.terms.adapters import find_adapter

__all__ = ["Orthonormal", "orthonormal_pull"]


class Orthonormal(Rule):
    """Adds the gradient of weight * mean over factors of ||U^T U - I||_F and ||V V^T - I||_F (Cao, 2024, arXiv
    2409.00055).

    Args:
        adapter: the name of the adapter whose trained Spectral terms are meant.
        weight: factor of the mean.
    """

    def __init__(self, adapter: str, weight: float) -> None:
        self.adapter, self.weight = adapter, weight

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        factors = self._factors(model)
        for parameter, columns in factors:
            if parameter.grad is None:
                continue
            side = whole(parameter)
            pull = orthonormal_pull(side.mT).mT if columns else orthonormal_pull(side)
            parameter.grad += sharded_like(pull * (self.weight / len(factors)), parameter)

    def _factors(self, model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
        """The trained sides, and whether it is their columns that shall be orthonormal."""
        modules = [m for term in find_adapter(model, self.adapter).all_terms() for m in term.modules()]
        trained = [m for m in modules if isinstance(m, Spectral) and m.U.requires_grad]
        return [pair for m in trained for pair in ((m.U, True), (m.V, False))]


def orthonormal_pull(V: Tensor) -> Tensor:
    """The gradient of ||V V^T - I||_F for V (r, n): 2 E V / ||E||_F with E = V V^T - I; zero where E is."""
    E = V @ V.mT - torch.eye(len(V), dtype=V.dtype, device=V.device)
    size = E.square().sum().sqrt()
    return (2 / size.clamp(min=torch.finfo(V.dtype).tiny)) * (E @ V)
