"""Kronecker: T = sum_k U_k (x) V_k, a sum of K Kronecker products, applied without building any of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.linalg.kronecker import kronecker_sum
from weft.tensors import owned
from weft.terms.base import Spec, Term

__all__ = ["Kronecker"]


class Kronecker(Term):
    """T = sum_k U_k (x) V_k with U (K, m1, n1) and V (K, m2, n2), m1 m2 = out, n1 n2 = in.

    T vec X = sum_k vec(U_k X V_k^T) for the input as a matrix X (n1, n2), row by row: K (n1 n2 m2 + m1 n1 m2) products
    a token instead of out * in.

    Args:
        count: K.
        left: m1 and n1, divisors of `out` and `in`.
    """

    kind = "kronecker"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        count: int,
        left: tuple[int, int],
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.count, self.left = count, tuple(left)
        m1, n1 = left
        self.U = nn.Parameter(torch.empty(count, m1, n1, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(count, out_features // m1, in_features // n1, device=device, dtype=dtype))

    @classmethod
    def from_factors(cls, U: Tensor, V: Tensor) -> Kronecker:
        """The term of given factors U (K, m1, n1) and V (K, m2, n2)."""
        (count, m1, n1), (_, m2, n2) = U.shape, V.shape
        term = cls(n1 * n2, m1 * m2, count, (m1, n1), device="meta", dtype=U.dtype)
        term.U, term.V = nn.Parameter(owned(U.detach())), nn.Parameter(owned(V.detach()))
        return term

    def forward(self, x: Tensor) -> Tensor:
        (m1, n1), (count, m2, n2) = self.left, self.V.shape
        # X V_k^T for all k at once, laid out as (n1 K, m2) for the sum over both n1 and k
        inner = F.linear(x.reshape(-1, n2), self.V.to(x.dtype).reshape(count * m2, n2)).view(-1, n1 * count, m2)
        U = self.U.to(inner.dtype).permute(1, 2, 0).reshape(m1, n1 * count)
        # two dimensions: for more, what is multiplied how depends on who requires a gradient, and the rounding with it
        outer = F.linear(inner.mT.reshape(-1, n1 * count), U).view(-1, m2, m1)
        return outer.mT.reshape(*x.shape[:-1], self.out_features)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return kronecker_sum(self.U.to(dtype or self.U.dtype), self.V.to(dtype or self.V.dtype))

    def spec(self) -> Spec:
        return super().spec() | {"count": self.count, "left": list(self.left)}
