"""RowRates: each row of the trained matrices takes a larger share of its step while it is short (ALLoRA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.rules.base import Rule

__all__ = ["RowRates", "row_rates"]


class RowRates(Rule):
    """w_i <- w_i + c_i (step of w_i),  c_i = 1 / sqrt(||w_i||_2 + 1 / eta^2), of the norm before the step (Huang and
    Balestriero, 2024, arXiv 2410.09692).

    The factor is applied to the step, after the optimizer has normalised it: Adam undoes a factor on the gradient. It
    scales the step's weight decay with it. For SGD both are the same.

    Args:
        eta: the factor of a row of zeros.
    """

    def __init__(self, eta: float) -> None:
        self.eta = eta
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, model: nn.Module) -> None:
        self.matrices = [parameter for parameter in self.trained() if parameter.dim() == 2]

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        self._before = [(p, p.detach().clone()) for p in self.matrices]

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for parameter, before in self._before:
            change = (parameter - before) * row_rates(before, self.eta)
            parameter.copy_(before + change)
        self._before = []


def row_rates(w: Tensor, eta: float) -> Tensor:
    """c (rows, 1) of a matrix (rows, columns), in fp32 at least."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    return torch.linalg.vector_norm(wide, dim=1, keepdim=True).add(1 / eta**2).rsqrt()
