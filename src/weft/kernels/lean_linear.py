"""Linear layers that keep the least for their backward pass: y = x W^T + sum_i s_i x A_i^T B_i^T + sum_j s_j x S_j^T +
bias in one autograd node.

Kept are x, once for the base and all parts, or what x is recomputed from (`weft.kernels.recompute`), and the rank-r
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
from weft.kernels.sparse_linear import add_entries, pull_entries, scatter_dense

__all__ = ["Entries", "Factor", "Part", "frozen_linear", "linear"]

Weight = Tensor | Callable[[torch.dtype], Tensor]
"""(out, in), or a function dtype -> frozen (out, in) made anew at each call."""


class Factor(NamedTuple):
    """s B A."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, in)
    scale: float

    def matrix(self) -> Tensor:
        """(out, in), differentiable."""
        return (self.B @ self.A) * self.scale

    def add(self, y: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Its product with rows (n, in) added to y (n, out) in place (None: to zeros); y, and what `pull` asks for."""
        hidden = F.linear(rows, self.A)
        if y is None:
            return F.linear(hidden if self.scale == 1.0 else hidden * self.scale, self.B), hidden
        return y.addmm_(hidden, self.B.mT, alpha=self.scale), hidden

    def pull(
        self, grad_x: Tensor | None, grad: Tensor, rows: Tensor | None, hidden: Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the rows, B and A, where `needs` says so in this order; the first is added to grad_x (n, in)
        in place (None: to zeros).
        """
        of_hidden = (grad @ self.B).mul_(self.scale) if needs[0] or needs[2] else None
        if needs[0]:
            assert of_hidden is not None
            grad_x = of_hidden @ self.A if grad_x is None else grad_x.addmm_(of_hidden, self.A)
        of_B = (grad.mT @ hidden).mul_(self.scale) if needs[1] else None  # type: ignore[operator]
        return grad_x, of_B, of_hidden.mT @ rows if needs[2] else None  # type: ignore[union-attr, operator]


class Entries(NamedTuple):
    """s S, where S (out, in) has values at flat row-major positions, ascending, and zeros elsewhere."""

    values: Tensor  # (k,)
    positions: Tensor  # (k,) integers
    out_features: int
    in_features: int
    scale: float = 1.0

    def matrix(self) -> Tensor:
        """As of `Factor`, and so are the others."""
        return scatter_dense(self.values, self.positions, self.out_features, self.in_features) * self.scale

    def add(self, y: Tensor | None, rows: Tensor) -> tuple[Tensor, None]:
        y = rows.new_zeros(len(rows), self.out_features) if y is None else y
        return add_entries(y, rows, self._scaled(), self.positions), None

    def pull(
        self, grad_x: Tensor | None, grad: Tensor, rows: Tensor | None, kept: Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if needs[0] and grad_x is None:
            grad_x = grad.new_zeros(len(grad), self.in_features)
        if not (needs[0] or needs[1]):
            return None, None, None
        found = pull_entries(grad_x, grad, rows if needs[1] else None, self._scaled(), self.positions)
        return grad_x, found if found is None or self.scale == 1.0 else found * self.scale, None

    def _scaled(self) -> Tensor:
        return self.values if self.scale == 1.0 else self.values * self.scale


Part = Factor | Entries


def linear(x: Tensor, weight: Weight | None, bias: Tensor | None = None, parts: Sequence[Part] = ()) -> Tensor:
    """x (..., in) -> (..., out) of W + the sum of the parts, in autocast's dtype if it is on, else in that of x.

    Args:
        weight: None for a layer of parts alone, of which there must be some.
    """
    frozen = weight if callable(weight) and not isinstance(weight, Tensor) else None
    flat = [t for part in parts for t in part[:2]]
    source = source_of(x)
    y: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x, source.recipe, source.tensors, frozen, None if frozen else weight, bias,
        [(type(part), part[2:]) for part in parts], *flat,
    )  # fmt: skip
    return y


def frozen_linear(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """x (..., in) times the transpose of a frozen matrix made from its code at each call: nothing is kept."""
    return linear(x, weight)


Kinds = Sequence[tuple[Callable[..., Part], tuple[Any, ...]]]
"""Of each part its class, and what follows its two tensors."""


def _parts(kinds: Kinds, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Part]:
    cast = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    return [kind(*cast[2 * i : 2 * i + 2], *rest) for i, (kind, rest) in enumerate(kinds)]


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
        kinds: Kinds,
        *tensors: Tensor,
    ) -> Tensor:
        dtype, needs = compute_dtype(x), ctx.needs_input_grad
        with without_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            matrix = frozen(dtype) if frozen else None if weight is None else weight.to(dtype)
            b = None if bias is None else bias.to(dtype)
            y, kept = None if matrix is None else F.linear(rows, matrix, b), []
            for part in _parts(kinds, tensors, dtype):
                y, own = part.add(y, rows)
                kept.append(own)
            assert y is not None
            y = y.add_(b) if matrix is None and b is not None else y
        ctx.recipe, ctx.frozen, ctx.kinds, ctx.dtype, ctx.shape = recipe, frozen, kinds, dtype, x.shape
        # what a factor's own B needs is x A^T alone
        wants_x = needs[4] or any(n for i, n in enumerate(needs[7:]) if i % 2 or kinds[i // 2][0] is not Factor)
        ctx.kept = len(source) if wants_x else 0
        kept_own = [own if need else None for own, need in zip(kept, needs[7::2], strict=True)]
        ctx.save_for_backward(*(source if wants_x else ()), weight if needs[0] else None, *kept_own, *tensors)
        return beside(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved, needs, dtype, count = ctx.saved_tensors, ctx.needs_input_grad, ctx.dtype, len(ctx.kinds)
        weight, kept, tensors = saved[ctx.kept], saved[ctx.kept + 1 :][:count], saved[ctx.kept + 1 + count :]
        grad = grad.reshape(-1, grad.shape[-1]).to(dtype)
        rows = fetch(ctx.recipe, saved[: ctx.kept]).reshape(-1, ctx.shape[-1]).to(dtype) if ctx.kept else None
        grad_x = grad_weight = None
        if needs[0]:
            based = ctx.frozen(dtype) if ctx.frozen else None if weight is None else weight.to(dtype)
            grad_x = None if based is None else grad @ based
        if needs[4]:
            grad_weight = grad.mT @ rows  # type: ignore[operator]
        grads: list[Tensor | None] = []
        for i, part in enumerate(_parts(ctx.kinds, tensors, dtype)):
            wanted = (needs[0], *needs[7 + 2 * i : 9 + 2 * i])
            grad_x, *found = part.pull(grad_x, grad, rows, kept[i], wanted)
            grads += [None if g is None else g.to(t.dtype) for g, t in zip(found, tensors[2 * i :], strict=False)]
        grad_bias = grad.sum(0) if needs[5] else None
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, None, None, grad_weight, grad_bias, None, *grads
