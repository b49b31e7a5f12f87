"""Sparse: T has nonzeros only on a fixed support, stored as flat row-major positions and their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.autocast import compute_dtype
from weft.kernels.lean_linear import Entries, Part
from weft.kernels.sparse_linear import entries_alone, scatter_dense, sparse_linear
from weft.kernels.transient_linear import Summand, sparse_summand
from weft.terms.base import Spec, Term

__all__ = ["Sparse"]

_INT32_LIMIT = 2**31


class Sparse(Term):
    """T[i, j] = values[k] where positions[k] = i * in + j. The support is sorted, free of duplicates and fixed."""

    kind = "sparse"
    lean_alone = True
    entries = ("values",)

    def __init__(self, in_features: int, out_features: int, nonzeros: int, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.nonzeros = nonzeros
        self.values = nn.Parameter(torch.empty(nonzeros, **place))
        # half the index memory wherever the matrix is small enough for 32 bits
        narrow = torch.int32 if in_features * out_features < _INT32_LIMIT else torch.int64
        self.register_buffer("positions", torch.empty(nonzeros, device=place.get("device"), dtype=narrow))
        self.positions: Tensor

    @classmethod
    def from_mask(cls, matrix: Tensor, mask: Tensor) -> Sparse:
        """The entries of `matrix` (out, in) where the boolean `mask` (out, in) is true, zeros among them included."""
        positions = mask.flatten().nonzero().squeeze(1)
        term = cls(matrix.shape[1], matrix.shape[0], positions.numel(), device=matrix.device, dtype=matrix.dtype)
        with torch.no_grad():
            term.positions.copy_(positions)
            term.values.copy_(matrix.flatten()[positions])
        return term

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.values, self.positions, self.out_features)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.values.to(dtype or self.values.dtype)
        return scatter_dense(values, self.positions, self.out_features, self.in_features)

    def lean_parts(self) -> list[Part] | None:
        return [Entries(self.values, self.positions, self.out_features, self.in_features)]

    def builds(self, x: Tensor) -> bool:
        return not entries_alone(self.values, self.out_features, self.in_features, compute_dtype(x))

    def summand(self) -> Summand | None:
        return sparse_summand(self.values, self.positions)

    def spec(self) -> Spec:
        return super().spec() | {"nonzeros": self.nonzeros}
