"""RandomCombination: T = scale * B A, each factor a learned sum of random matrices that nobody keeps (NOLA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.autocast import without_autocast
from weft.linalg.counter import check_numbers, levels, subseed, symmetric, verify
from weft.terms.base import Spec
from weft.terms.factored import Factored

__all__ = ["RandomCombination", "combine"]

_CHUNK = 1 << 18
"""Numbers of the basis that exist at a time: few enough to stay in a core's cache."""
_OF_A, _OF_B, _OF_START = range(3)


class RandomCombination(Factored):
    """A = A_0 + sum_i c_i P_i and B = sum_j d_j Q_j, with P_i (r, in) and Q_j (out, r) uniform in [-1, 1] / sqrt(k),
    in 256 steps.

    Koohpayegani et al., 2023, arXiv 2310.02556, equation 2. What is stored is c (k,) and d (k,); A_0, P and Q are
    functions of the seed (`weft.linalg.counter`), computed a chunk at a time in forward and again in backward.

    Args:
        num_basis: k, matrices to each factor.
        seed: of A_0, P and Q.
        check: the seed's first numbers, verified where given.

    Raises:
        WeftError: the seed gives other numbers than `check` here.
    """

    kind = "random_combination"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        num_basis: int,
        seed: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        check: Sequence[float] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, scale=scale, dropout=dropout)
        self.num_basis, self.seed = num_basis, seed
        if check is not None:
            verify(seed, list(check))
        self.c = nn.Parameter(torch.empty(num_basis, device=device, dtype=dtype))
        self.d = nn.Parameter(torch.empty(num_basis, device=device, dtype=dtype))

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        dtype = dtype or self.c.dtype
        A = combine(self.c.to(dtype), subseed(self.seed, _OF_A), (self.rank, self.in_features))
        B = combine(self.d.to(dtype), subseed(self.seed, _OF_B), (self.out_features, self.rank))
        return B, self.start().to(dtype) + A

    def start(self) -> Tensor:
        """A_0 (r, in) fp32, Kaiming uniform as in LoRA: U(-1/sqrt(in), 1/sqrt(in))."""
        seed = subseed(self.seed, _OF_START)
        numbers = symmetric(seed, self.in_features, (0, self.rank), self.c.device)
        return numbers / math.sqrt(self.in_features)

    def spec(self) -> Spec:
        own = {"num_basis": self.num_basis, "seed": self.seed, "check": check_numbers(self.seed)}
        return super().spec() | own


def combine(coefficients: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
    """sum_i c_i P_i / sqrt(k) for the k coefficients, P_i of `shape` uniform in [-1, 1]; backward draws P again."""
    combined: Tensor = _Combine.apply(coefficients, seed, shape)  # type: ignore[no-untyped-call]
    return combined


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
        ctx.seed, ctx.count = seed, coefficients.shape[0]
        total = coefficients.new_zeros(shape[0] * shape[1])
        with without_autocast(coefficients):
            for first, last, block in levels(seed, len(total), ctx.count, _CHUNK, total.device):
                total = total + coefficients[first:last] @ block.to(total.dtype)
        return total.view(shape) * ctx.count**-0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flat = grad.reshape(-1)
        with without_autocast(flat):
            blocks = levels(ctx.seed, len(flat), ctx.count, _CHUNK, flat.device)
            parts = [block.to(flat.dtype) @ flat for _, _, block in blocks]
        return torch.cat(parts) * ctx.count**-0.5, None, None
