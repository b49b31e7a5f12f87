"""Product with a matrix that is zero but for r of its columns, keeping r numbers a token for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.autocast import compute_dtype
from weft.kernels.recompute import Source, fetch, source_of

__all__ = ["column_linear"]


def column_linear(x: Tensor, values: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x[..., columns] values^T: x (..., in), values (out, r), columns (r,) -> (..., out), in autocast's dtype
    if it is on, else in that of x. Of x only the chosen channels are kept, or what x is recomputed from.
    """
    recipe, kept, _ = Source(None, (), 0) if torch.compiler.is_compiling() else source_of(x)
    if recipe is None:
        kept = (x.detach().index_select(-1, columns).to(compute_dtype(x)),)
    return _ColumnLinear.apply(x, recipe, kept, values, columns, scale)  # type: ignore[no-untyped-call]


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, recipe: Any, kept: tuple[Tensor, ...], values: Tensor, columns: Tensor, scale: float
    ) -> Tensor:
        chosen = kept[0] if recipe is None else x.index_select(-1, columns).to(compute_dtype(x))
        return F.linear(chosen, values.to(chosen.dtype)) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.recipe, kept, values, columns, ctx.scale = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(*kept, values, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *kept, values, columns = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            back = (grad @ values.to(grad.dtype)) * ctx.scale
            grad_x = grad.new_zeros(ctx.shape).index_copy(-1, columns.long(), back).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            chosen = kept[0] if ctx.recipe is None else fetch(ctx.recipe, kept).index_select(-1, columns)
            rows = grad.reshape(-1, grad.shape[-1])
            grad_values = (rows.mT @ chosen.reshape(-1, chosen.shape[-1]).to(grad.dtype)).to(values.dtype) * ctx.scale
        return grad_x, None, None, grad_values, None, None
