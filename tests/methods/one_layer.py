"""A model of one linear layer, and what compares its numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["One", "close"]


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, W: Tensor, bias: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=bias)
        self.layer.weight = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of b's largest entry."""
    a, b = a.detach().double(), b.detach().double()
    torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max().clamp(min=1e-30)), rtol=0)
