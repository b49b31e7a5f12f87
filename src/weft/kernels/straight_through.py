"""A value for the forward pass, and the gradient of another tensor for the backward pass (the straight-through
estimator, Bengio et al., 2013, arXiv 1308.3432), without the two passes over memory of `value + (x - x.detach())`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["straight_through"]


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """`value`, exactly; its gradient goes to `x`, of the same shape and dtype, as it is, and none to `value`.

    Example:
        >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> straight_through(x.detach().round(), x).pow(2).sum().backward()
        >>> x.grad
        tensor([0., 4.])
    """
    found: Tensor = _StraightThrough.apply(value.detach(), x)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, x: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad
