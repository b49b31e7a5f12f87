"""Sensitivity: how much the loss depends on what a term adds to a layer, sum |dW o dL/d(dW)| / sqrt(out in)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.rules.scope import in_use
from weft.terms import Spectral

__all__ = ["Sensitivity"]


class Sensitivity:
    """A forward hook of a layer that sums the layer's sensitivity over the backward passes since it was last
    taken (Zhang et al., 2023, arXiv 2308.12043).

    The absolute values need the whole out x in gradient: it is made for one layer at a time, in its backward pass, and
    let go of at once. Nothing is kept between but the layer's input, once, also by activation checkpointing. Under
    torch.compile the graph breaks there while training, until growth is complete.

    Args:
        term: dW, in the layer's sum.
    """

    def __init__(self, term: Spectral) -> None:
        self.term, self.on = term, True
        self.total: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        term = self.term
        if not (self.on and module.training and output.requires_grad and in_use(module, term)):
            return None
        watched: Tensor = _Watch.apply(output, args[0], term.U, term.s, term.V, term.scale, self)  # type: ignore[no-untyped-call]
        return watched

    def add(self, value: Tensor) -> None:
        """One more backward pass."""
        self.total = value if self.total is None else self.total + value

    def take(self, like: Tensor) -> Tensor:
        """The sum since the last time, a scalar."""
        total, self.total = self.total, None
        return like.new_zeros((), dtype=torch.float32) if total is None else total


class _Watch(torch.autograd.Function):
    """y, whose backward pass measures."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, U: Tensor, s: Tensor, V: Tensor, scale: float, hook: Sensitivity
    ) -> Any:
        ctx.save_for_backward(x, U, s, V)
        ctx.scale, ctx.hook = scale, hook
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, U, s, V = ctx.saved_tensors
        with torch.no_grad():
            G = grad.reshape(-1, grad.shape[-1]).float().mT @ x.reshape(-1, x.shape[-1]).float()
            delta = (U.float() * (s.float() * ctx.scale)) @ V.float()
            ctx.hook.add((delta * G).abs().sum() / G.numel() ** 0.5)
        return grad, None, None, None, None, None, None
