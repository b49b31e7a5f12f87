"""Linear layers that keep the least for their backward pass: y = x W^T + sum_i s_i x A_i^T B_i^T + bias in one
autograd node.

Kept are x, once for the base and all factors, or what x is recomputed from (`weft.kernels.recompute`), and the rank-r
x A_i^T; nothing of size (tokens, out), and no x at all where neither W nor any A is trained. The products accumulate
in place, so that a sum costs no pass over y of its own; the base may be a function that dequantises it, which is
called again in backward and kept in between by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.kernels.autocast import compute_dtype, without_autocast
from weft.kernels.recompute import fetch, source_of
from weft.kernels.shapes import beside

__all__ = ["Factor", "frozen_linear", "linear"]

Weight = Tensor | Callable[[torch.dtype], Tensor]
"""(out, in), or a function dtype -> frozen (out, in) made anew at each call."""


class Factor(NamedTuple):
    """s B A."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, in)
    scale: float


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, factors: Sequence[Factor] = ()) -> Tensor:
    """x (..., in) -> (..., out) of W + sum_i s_i B_i A_i, in autocast's dtype if it is on, else in that of x."""
    frozen = None if isinstance(weight, Tensor) else weight
    flat = [t for factor in factors for t in factor[:2]]
    source = source_of(x)
    y: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x, source.recipe, source.tensors, frozen, None if frozen else weight, bias, [f.scale for f in factors], *flat
    )
    return y


def frozen_linear(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """x (..., in) times the transpose of a frozen matrix made from its code at each call: nothing is kept."""
    return linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: Any,
        source: tuple[Tensor, ...],
        frozen: Callable[[torch.dtype], Tensor] | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scales: list[float],
        *factors: Tensor,
    ) -> Tensor:
        dtype = compute_dtype(x)
        needs = ctx.needs_input_grad
        with without_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            matrix = frozen(dtype) if weight is None else weight.to(dtype)  # type: ignore[misc]
            y = F.linear(rows, matrix, None if bias is None else bias.to(dtype))
            hidden = []
            for B, A, scale in zip(factors[::2], factors[1::2], scales, strict=True):
                hidden.append(F.linear(rows, A.to(dtype)))
                y.addmm_(hidden[-1], B.to(dtype).mT, alpha=scale)
        ctx.recipe, ctx.frozen, ctx.scales, ctx.dtype, ctx.shape = recipe, frozen, scales, dtype, x.shape
        wants_x = needs[4] or any(needs[8::2])
        ctx.kept = len(source) if wants_x else 0
        # x A^T is for the gradient of B alone
        kept_hidden = [h if need else None for h, need in zip(hidden, needs[7::2], strict=True)]
        ctx.save_for_backward(*(source if wants_x else ()), weight if needs[0] else None, *kept_hidden, *factors)
        return beside(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved, needs, dtype, count = ctx.saved_tensors, ctx.needs_input_grad, ctx.dtype, len(ctx.scales)
        weight, hidden, factors = saved[ctx.kept], saved[ctx.kept + 1 :][:count], saved[ctx.kept + 1 + count :]
        grad = grad.reshape(-1, grad.shape[-1]).to(dtype)
        rows = fetch(ctx.recipe, saved[: ctx.kept]).reshape(-1, ctx.shape[-1]).to(dtype) if ctx.kept else None
        grad_x = grad_weight = None
        if needs[0]:
            grad_x = grad @ (ctx.frozen(dtype) if ctx.frozen else weight.to(dtype))
        if needs[4]:
            grad_weight = grad.mT @ rows  # type: ignore[operator]
        grads: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            B, A = factors[2 * i].to(dtype), factors[2 * i + 1].to(dtype)
            grad_hidden = (grad @ B).mul_(scale) if needs[0] or needs[8 + 2 * i] else None
            grads.append((grad.mT @ hidden[i]).mul_(scale) if needs[7 + 2 * i] else None)
            grads.append(grad_hidden.mT @ rows if needs[8 + 2 * i] else None)  # type: ignore[union-attr, operator]
            if grad_x is not None:
                grad_x.addmm_(grad_hidden, A)
        grad_bias = grad.sum(0) if needs[5] else None
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, None, None, grad_weight, grad_bias, None, *grads
