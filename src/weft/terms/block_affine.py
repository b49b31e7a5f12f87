"""BlockAffine: every r x r block of the weight times one matrix of its row of blocks, plus that matrix (BAT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.terms.base import Spec, Term
from weft.terms.wrapper import Wrapper

__all__ = ["BlockAffine"]


class BlockAffine(Wrapper):
    """T_ij = W_ij (I + D_i) + D_i for the block in block row i and block column j (Kang, 2024, arXiv 2409.15371).

    The change W_ij D_i + D_i is built at each call, as large as W and of full rank; it is added to W x rather than to
    W, where a low precision would round it away.

    Args:
        side: r, a divisor of both sides; D is (out / r, r, r).
        inner: the terms of W.
    """

    kind = "block_affine"

    def __init__(
        self, in_features: int, out_features: int, side: int, inner: Mapping[str, Term] | None = None, **place: Any
    ) -> None:
        super().__init__(in_features, out_features, inner)
        self.side = side
        self.D = nn.Parameter(torch.empty(out_features // side, side, side, **place))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.change(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self._reference().dtype
        return self.base_dense(dtype) + self.change(dtype)

    def change(self, dtype: torch.dtype) -> Tensor:
        """W_ij D_i + D_i (out, in)."""
        D, r = self.D.to(dtype), self.side
        # the rows of a block row, each cut into its blocks: (out / r, r * in / r, r)
        rows = self.base_dense(dtype).reshape(len(D), -1, r)
        moved = (rows @ D).view(len(D), r, -1, r) + D.unsqueeze(2)
        return moved.view(self.out_features, self.in_features)

    def spec(self) -> Spec:
        return super().spec() | {"side": self.side}
