"""Product with a matrix of sparse support, keeping x (or what it is recomputed from), the values and the support alone.

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

from weft.kernels.autocast import compute_dtype
from weft.kernels.recompute import Source, fetch, source_of

__all__ = ["scatter_dense", "sparse_linear"]


def scatter_dense(values: Tensor, positions: Tensor, out_features: int, in_features: int) -> Tensor:
    """The (out, in) matrix with values (k,) at flat row-major positions (k,); differentiable in the values."""
    flat = torch.zeros(out_features * in_features, dtype=values.dtype, device=values.device)
    return flat.scatter(0, positions.long(), values).view(out_features, in_features)


def sparse_linear(
    x: Tensor, values: Tensor, positions: Tensor, out_features: int, probe: Tensor | None = None
) -> Tensor:
    """x (..., in) times the transpose of the sparse matrix of values (k,) at positions (k,): (..., out).

    Computed in autocast's dtype if it is on, else in that of x. A `probe` (out, in) stands for a zero matrix added to
    the sparse one: it is not read, and its gradient is the dense one.
    """
    # compiled code keeps or makes x again as its own partitioner sees fit
    recipe, kept, _ = Source(None, (x,), 0) if torch.compiler.is_compiling() else source_of(x)
    return _SparseLinear.apply(x, recipe, kept, values, positions, out_features, probe)  # type: ignore[no-untyped-call]


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        recipe: Any,
        kept: tuple[Tensor, ...],
        values: Tensor,
        positions: Tensor,
        out_features: int,
        probe: Any,
    ) -> Tensor:
        dtype = compute_dtype(x)
        return F.linear(x.to(dtype), scatter_dense(values.to(dtype), positions, out_features, x.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.recipe, kept, values, positions, ctx.out_features, _ = inputs
        ctx.dtype, ctx.kept = x.dtype, len(kept)
        ctx.save_for_backward(*kept, values, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        *kept, values, positions = ctx.saved_tensors
        needs, grad_x, grad_values, full = ctx.needs_input_grad, None, None, None
        x = fetch(ctx.recipe, kept).to(grad.dtype)
        if needs[0]:
            grad_x = grad @ scatter_dense(values.to(grad.dtype), positions, ctx.out_features, x.shape[-1])
        if needs[3] or needs[6]:
            full = grad.reshape(-1, grad.shape[-1]).transpose(0, 1) @ x.reshape(-1, x.shape[-1])
            grad_values = full.flatten()[positions.long()].to(values.dtype)
        grad_x = None if grad_x is None else grad_x.to(ctx.dtype)
        return grad_x, None, None, grad_values, None, None, full if needs[6] else None
