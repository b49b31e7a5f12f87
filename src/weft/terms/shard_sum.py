"""ShardSum: T[o, c] = D[c mod r, o mod m], one small matrix shared by all shards of the input (Bone, MiSS)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.terms.base import Factors, Spec, Term

__all__ = ["ShardSum"]


class ShardSum(Term):
    """T x = D^T (the sum of the shards of x of length r), repeated until it is `out` long (Kang, 2024, arXiv
    2409.15371).

    x is cut into shards of length r, the last one filled up with zeros; D is (r, m). T is the product of D^T and a
    fixed binary matrix that nobody stores, hence of rank r at most.

    Args:
        rank: r.
        columns: m, a divisor of `out`; the outputs o and o + m are the same.
    """

    kind = "shard_sum"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        columns: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.columns = rank, columns
        self.D = nn.Parameter(torch.empty(rank, columns, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -self.in_features % self.rank))
        shards = x.reshape(*x.shape[:-1], x.shape[-1] // self.rank, self.rank).sum(-2)
        y = F.linear(shards, self.D.to(x.dtype).mT)
        return y.repeat(*[1] * (y.dim() - 1), self.out_features // self.columns)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        B, A = self.factors(dtype or self.D.dtype)
        return B @ A

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B (out, r), D^T repeated, and the binary A (r, in), A[j, c] = 1 where c mod r = j."""
        B = self.D.to(dtype).mT.repeat(self.out_features // self.columns, 1)
        channels = torch.arange(self.in_features, device=B.device) % self.rank
        return B, torch.eye(self.rank, device=B.device, dtype=dtype)[channels].mT

    def exact_factors(self) -> Factors | None:
        B, A = self.factors(torch.float32)
        return B.detach(), A

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank, "columns": self.columns}
