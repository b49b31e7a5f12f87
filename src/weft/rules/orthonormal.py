"""Orthonormal: a pull of singular vectors towards orthonormality, added to the gradients after clipping (SORSA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.rules.base import Rule
from weft.rules.schedule import peak_rate
from weft.rules.sharded import sharded_like, whole
from weft.terms import Spectral

__all__ = ["Orthonormal", "orthonormal_pull"]


class Orthonormal(Rule):
    """Adds the gradient of gamma / lr * mean over the trained factors of ||U^T U - I||_F and ||V V^T - I||_F (Cao,
    2024, arXiv 2409.00055).

    Args:
        gamma: what a step at the peak rate takes of the mean.
        lr: the peak learning rate; None for the optimizer's.
    """

    works_on = (Spectral,)

    def __init__(self, gamma: float, *, lr: float | None = None) -> None:
        self.gamma, self.lr = gamma, lr
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        trained = [term for _, term in self.found(Spectral) if term.U.requires_grad]
        self.factors = [pair for term in trained for pair in ((term.U, True), (term.V, False))]  # columns, or rows
        sides = [side for side, _ in self.factors]
        self.weight = self.gamma / (peak_rate(self.optimizer, sides, "The pull") if self.lr is None else self.lr)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for parameter, columns in self.factors:
            if parameter.grad is None:
                continue
            side = whole(parameter)
            pull = orthonormal_pull(side.mT).mT if columns else orthonormal_pull(side)
            parameter.grad += sharded_like(pull * (self.weight / len(self.factors)), parameter)


def orthonormal_pull(V: Tensor) -> Tensor:
    """The gradient of ||V V^T - I||_F for V (r, n): 2 E V / ||E||_F with E = V V^T - I; zero where E is."""
    E = V @ V.mT - torch.eye(len(V), dtype=V.dtype, device=V.device)
    size = E.square().sum().sqrt()
    return (2 / size.clamp(min=torch.finfo(V.dtype).tiny)) * (E @ V)
