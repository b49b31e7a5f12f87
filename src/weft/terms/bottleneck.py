"""Bottleneck: a small nonlinear network after a layer, h + U(gelu(D(h))) with h its output (Compacter)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.terms.base import Spec, Term
from weft.terms.wrapper import Wrapper

__all__ = ["Bottleneck", "HyperLinear"]


class HyperLinear(nn.Module):
    """x -> x W + bias with W = sum_i A_i (x) (s_i t_i) (p, q), for A (n, n, n) given at each call; W is not built.

    s is (n, p / n, r) and t (n, r, q / n): p + q numbers for r = 1 instead of p q.
    """

    def __init__(self, p: int, q: int, n: int, rank: int, **place: Any) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(n, p // n, rank, **place))
        self.t = nn.Parameter(torch.empty(n, rank, q // n, **place))
        self.bias = nn.Parameter(torch.empty(q, **place))

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        s, t, A = (tensor.to(x.dtype) for tensor in (self.s, self.t, A))
        blocks = x.unflatten(-1, (len(A), s.shape[1]))  # type: ignore[no-untyped-call]
        inner = torch.einsum("...ap,ipr->...air", blocks, s)
        mixed = torch.einsum("...air,iab->...bir", inner, A)
        y = torch.einsum("...bir,irq->...bq", mixed, t).flatten(-2)
        return y + self.bias.to(y.dtype)

    def matrix(self, A: Tensor) -> Tensor:
        """W (p, q)."""
        return sum((torch.kron(a, s @ t) for a, s, t in zip(A, self.s, self.t, strict=True)), start=A.new_zeros(()))


class Bottleneck(Wrapper):
    """T(x) = h + U(gelu(D(h + b))) with h = W x and b the layer's bias, which is added to T(x) afterwards (Karimi
    Mahabadi et al., 2021, arXiv 2106.04647, equations 2 and 5).

    It has no matrix: `dense` raises. A may belong to all such terms of a model.

    Args:
        width: of the bottleneck.
        n: how many matrices A_i (n x n) the two projections are made with; a divisor of `out` and `width`.
        rank: of the other Kronecker factors.
        offset: whether the layer has a bias; a copy is kept, for the sum of terms adds its own after T.
        inner: the terms of W.
    """

    kind = "bottleneck"
    linear: ClassVar[bool] = False
    _tied_weights_keys: ClassVar[dict[str, str]] = {"A": "A"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        n: int,
        rank: int,
        offset: bool = False,
        inner: Mapping[str, Term] | None = None,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, inner)
        self.width, self.n, self.rank = width, n, rank
        self.A = nn.Parameter(torch.empty(n, n, n, **place))
        self.down = HyperLinear(out_features, width, n, rank, **place)
        self.up = HyperLinear(width, out_features, n, rank, **place)
        self.register_buffer("offset", torch.empty(out_features, **place) if offset else None)
        self.offset: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        whole = h if self.offset is None else h + self.offset.to(h.dtype)
        return h + self.up(F.gelu(self.down(whole, self.A), approximate="tanh"), self.A)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        raise WeftError(
            "A bottleneck with a nonlinearity after the layer is no matrix: it cannot be merged or combined, and no "
            "other format holds it; keep it beside the model (weft.save_adapter)."
        )

    def spec(self) -> Spec:
        sizes = {"width": self.width, "n": self.n, "rank": self.rank, "offset": self.offset is not None}
        return super().spec() | sizes
