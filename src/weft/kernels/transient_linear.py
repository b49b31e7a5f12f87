"""Product with a matrix that exists for the moment: W = sum of summands is built once in forward and once more in
backward, and neither W nor the (out, in) gradient of it is kept.

    forward     W = sum_i T_i,   y = x W^T + bias                              saved: x, the tensors of the summands
    backward    W built anew, dx = g W, W freed;   G = g^T x, each summand takes its gradients from G, G freed

So many tokens meet one product in place of one a summand, and memory beyond the summands' own is one (out, in) matrix
at a time (SLTrain, Han et al., 2024, arXiv 2406.02214, algorithm 1). For few tokens, building W costs more than it
saves: `worthwhile` says when not to.

Legend: x (..., in), W (out, in), B (out, r), A (r, in), values (k,) at flat row-major positions (k,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.autocast import compute_dtype, without_autocast
from weft.kernels.recompute import Source, fetch, source_of
from weft.kernels.shapes import beside

__all__ = ["Summand", "companded_summand", "low_rank_summand", "sparse_summand", "transient_linear", "worthwhile"]


class Summand(NamedTuple):
    """One matrix of the sum."""

    add: Callable[..., None]  # (W, scale, *tensors): W += scale * T, in place; floating-point tensors are in W's dtype
    pull: Callable[..., tuple[Tensor | None, ...]]  # (G, scale, *tensors) -> the gradient of each of the tensors
    scale: float
    tensors: tuple[Tensor, ...]
    cast: bool = True  # False: the tensors come as they are stored, for codes that a cast would change


def low_rank_summand(B: Tensor, A: Tensor, scale: float = 1.0) -> Summand:
    """scale * B A."""
    return Summand(_add_product, _pull_product, scale, (B, A))


def sparse_summand(values: Tensor, positions: Tensor, scale: float = 1.0) -> Summand:
    """`values` at `positions`, which are all different."""
    return Summand(_add_entries, _pull_entries, scale, (values, positions))


def companded_summand(V: Tensor, log_a: Tensor, log_b: Tensor) -> Summand:
    """exp(log_a) arctan(V / exp(log_b)), entry by entry; V (out, in), the others (1,)."""
    return Summand(_add_companded, _pull_companded, 1.0, (V, log_a, log_b))


def worthwhile(rows: int, out_features: int, in_features: int) -> bool:
    """Whether so many rows of x are better served by W than by one product a summand: building B A takes r out in
    multiplications, which r (in + out) for each row outweigh from here on.
    """
    return rows * (out_features + in_features) > out_features * in_features


def transient_linear(x: Tensor, summands: Sequence[Summand], out_features: int, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the transpose of the sum of the summands, plus bias (out,): (..., out).

    Computed in autocast's dtype if it is on, else in that of x.
    """
    # compiled code keeps or makes x again as its own partitioner sees fit
    recipe, kept, _ = Source(None, (x,), 0) if torch.compiler.is_compiling() else source_of(x)
    plan = [(s.add, s.pull, s.scale, s.cast, len(s.tensors)) for s in summands]
    tensors = [tensor for s in summands for tensor in s.tensors]
    y: Tensor = _TransientLinear.apply(x, recipe, kept, bias, plan, out_features, *tensors)  # type: ignore[no-untyped-call]
    return y


def _add_product(W: Tensor, scale: float, B: Tensor, A: Tensor) -> None:
    W.addmm_(B, A, alpha=scale)


def _pull_product(G: Tensor, scale: float, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    return (G @ A.mT).mul_(scale), (B.mT @ G).mul_(scale)


def _add_entries(W: Tensor, scale: float, values: Tensor, positions: Tensor) -> None:
    W.view(-1).scatter_add_(0, positions.long(), values if scale == 1.0 else values * scale)


def _pull_entries(G: Tensor, scale: float, values: Tensor, positions: Tensor) -> tuple[Tensor, None]:
    found = G.view(-1)[positions.long()]
    return found if scale == 1.0 else found * scale, None


def _add_companded(W: Tensor, scale: float, V: Tensor, log_a: Tensor, log_b: Tensor) -> None:
    W.add_((V / log_b.exp()).atan_().mul_(log_a.exp()))


def _pull_companded(G: Tensor, scale: float, V: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, ...]:
    a, b = log_a.exp(), log_b.exp()
    ratio = V / b
    by_a = (G * ratio.atan()).sum().reshape(1) * a
    by_V = G * (a / b) / ratio.square().add_(1)
    return by_V, by_a, -(by_V * V).sum().reshape(1)  # W depends on V / b alone


Plan = list[tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]], float, bool, int]]


def _build(plan: Plan, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    W = torch.zeros(shape, dtype=dtype, device=tensors[0].device)
    start = 0
    for add, _, scale, cast, count in plan:
        part = tensors[start : start + count]
        add(W, scale, *(_cast(part, dtype) if cast else part))
        start += count
    return W


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


class _TransientLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, recipe: Any, kept: tuple[Tensor, ...], bias: Any, plan: Plan, out_features: int, *tensors: Tensor
    ) -> Tensor:
        dtype = compute_dtype(x)
        with without_autocast(x):
            W = _build(plan, tensors, (out_features, x.shape[-1]), dtype)
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            return beside(F.linear(rows, W, None if bias is None else bias.to(dtype)), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.recipe, kept, _, ctx.plan, ctx.out_features, *tensors = inputs
        ctx.dtype, ctx.kept = x.dtype, len(kept)
        ctx.save_for_backward(*kept, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        needs, grad_x, grad_bias = ctx.needs_input_grad, None, None
        saved = ctx.saved_tensors  # asked for once, as checkpointing demands
        x, tensors = fetch(ctx.recipe, saved[: ctx.kept]).to(grad.dtype), saved[ctx.kept :]
        g = grad.reshape(-1, grad.shape[-1])
        with without_autocast(grad):
            if needs[0]:
                W = _build(ctx.plan, tensors, (ctx.out_features, x.shape[-1]), grad.dtype)
                grad_x = (g @ W).view(x.shape).to(ctx.dtype)
                del W
            if needs[3]:
                grad_bias = g.sum(0)
            grads: list[Tensor | None] = [None] * len(tensors)
            if any(needs[6:]):
                G = g.mT @ x.reshape(-1, x.shape[-1])
                start = 0
                for _, pull, scale, cast, count in ctx.plan:
                    part = tensors[start : start + count]
                    found = pull(G, scale, *(_cast(part, G.dtype) if cast else part))
                    for i, (own, value) in enumerate(zip(part, found, strict=True), start):
                        grads[i] = value.to(own.dtype) if value is not None and needs[6 + i] else None
                    start += count
        return grad_x, None, None, grad_bias, None, None, *grads
