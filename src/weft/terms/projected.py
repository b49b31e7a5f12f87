"""Projected: T = gain * P theta, a whole matrix from a few numbers that layers share, by a fixed random map (SAID)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.autocast import without_autocast
from weft.linalg.counter import check_numbers, verify
from weft.linalg.fastfood import fastfood, fastfood_transposed
from weft.terms.base import Spec, Term

__all__ = ["Projected", "project"]


class Projected(Term):
    """T = gain * (P theta) as an (out, in) matrix, P the Fastfood map of the seed (`weft.linalg.fastfood`).

    Aghajanyan et al., 2020, arXiv 2012.13255, section 3. The matrix is built whole at each call, and kept for the
    gradient of x: as published, a diagnostic and no saver of memory.

    Args:
        width: d, numbers in theta.
        seed: of P.
        check: the seed's first numbers, verified where given.

    Raises:
        WeftError: the seed gives other numbers than `check` here.
    """

    kind = "projected"
    # what transformers looks for when it writes shared tensors once
    _tied_weights_keys: ClassVar[dict[str, str]] = {"theta": "theta"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        seed: int,
        *,
        check: Sequence[float] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.width, self.seed = width, seed
        if check is not None:
            verify(seed, list(check))
        self.theta = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.gain = nn.Parameter(torch.empty(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.theta.dtype
        projected = project(self.theta.to(dtype), self.seed, self.out_features * self.in_features)
        return self.gain.to(dtype) * projected.view(self.out_features, self.in_features)

    def spec(self) -> Spec:
        return super().spec() | {"width": self.width, "seed": self.seed, "check": check_numbers(self.seed)}


def project(theta: Tensor, seed: int, size: int) -> Tensor:
    """P theta (size,) for theta (d,); differentiable, and backward computes P again."""
    projected: Tensor = _Project.apply(theta, seed, size)  # type: ignore[no-untyped-call]
    return projected


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, seed: int, size: int) -> Tensor:
        ctx.seed, ctx.width = seed, len(theta)
        with without_autocast(theta):
            return fastfood(theta, seed, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with without_autocast(grad):
            return fastfood_transposed(grad, ctx.seed, ctx.width), None, None
