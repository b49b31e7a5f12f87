"""Product with a matrix of fixed sparse support, keeping only x, the values and the support for the backward pass.

The matrix is scattered into a transient (out, in) buffer for one matrix product; at the densities weft uses (1 to 50 %)
this is faster than compressed-row products on CPU and GPU alike, and the buffer is freed before the next layer. The
gradient of the values is the dense gradient g^T x read at the support (SLTrain, Han et al., 2024, arXiv 2406.02214,
section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["scatter_dense", "sparse_linear"]


def scatter_dense(values: Tensor, positions: Tensor, out_features: int, in_features: int) -> Tensor:
    """The (out, in) matrix with values (k,) at flat row-major positions (k,); differentiable in the values."""
    flat = torch.zeros(out_features * in_features, dtype=values.dtype, device=values.device)
    return flat.scatter(0, positions.long(), values).view(out_features, in_features)


def sparse_linear(
    x: Tensor, values: Tensor, positions: Tensor, out_features: int, probe: Tensor | None = None
) -> Tensor:
    """x (..., in) times the transpose of the sparse matrix of values (k,) at positions (k,): (..., out).

    A `probe` (out, in) stands for a zero matrix added to it: it is not read, and its gradient is the dense one.
    """
    return _SparseLinear.apply(x, values, positions, out_features, probe)  # type: ignore[no-untyped-call]


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, values: Tensor, positions: Tensor, out_features: int, probe: Tensor | None) -> Tensor:
        return F.linear(x, scatter_dense(values, positions, out_features, x.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, positions, ctx.out_features, _ = inputs
        ctx.save_for_backward(x, values, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values, positions = ctx.saved_tensors
        grad_x = grad_values = full = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ scatter_dense(values, positions, ctx.out_features, x.shape[-1])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
            full = grad.reshape(-1, grad.shape[-1]).transpose(0, 1) @ x.reshape(-1, x.shape[-1])
            grad_values = full.flatten()[positions.long()].to(values.dtype)
        return grad_x, grad_values, None, None, full if ctx.needs_input_grad[4] else None
