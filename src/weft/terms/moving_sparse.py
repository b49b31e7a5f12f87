"""MovingSparse: k trained entries of a matrix whose places change during training, and the entries they left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.sparse_linear import scatter_dense, sparse_linear
from weft.terms.base import Spec, Term

__all__ = ["MovingSparse"]


class MovingSparse(Term):
    """T[i, j] = values[k] where positions[k] = i * in + j, settled[k] where settled_positions[k] is, else 0.

    `values` are trained; `settled` is what was learned on entries that are no longer chosen, and may grow. The two
    supports are sorted and have no entry in common. A rule moves them, see `weft.rules.support`.

    `probe`, where it is set, is a zero matrix (out, in) whose gradient is the dense one of T; no part of the state.
    """

    kind = "moving_sparse"
    lean_alone = True

    def __init__(self, in_features: int, out_features: int, nonzeros: int, *, settled: int = 0, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.nonzeros = nonzeros
        self.probe: Tensor | None = None
        self.values = nn.Parameter(torch.empty(nonzeros, **place))
        places = torch.int32 if in_features * out_features < 2**31 else torch.int64
        self.register_buffer("positions", torch.empty(nonzeros, device=place.get("device"), dtype=places))
        self.register_buffer("settled", torch.empty(settled, **place))
        self.register_buffer("settled_positions", torch.empty(settled, device=place.get("device"), dtype=places))
        self.positions: Tensor
        self.settled: Tensor
        self.settled_positions: Tensor

    @classmethod
    def at(cls, positions: Tensor, out_features: int, in_features: int, *, dtype: torch.dtype) -> MovingSparse:
        """Zeros at flat row-major `positions` (k,), given in any order, distinct."""
        term = cls(in_features, out_features, positions.numel(), device=positions.device, dtype=dtype)
        with torch.no_grad():
            term.positions.copy_(positions.sort().values)
            term.values.zero_()
        return term

    def forward(self, x: Tensor) -> Tensor:
        values, positions = self._all()
        return sparse_linear(x, values, positions, self.out_features, self.probe)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values, positions = self._all()
        return scatter_dense(values.to(dtype or values.dtype), positions, self.out_features, self.in_features)

    def spec(self) -> Spec:
        return super().spec() | {"nonzeros": self.nonzeros, "settled": self.settled.numel()}

    def _all(self) -> tuple[Tensor, Tensor]:
        """Values and positions of everything that is not zero."""
        if not self.settled.numel():
            return self.values, self.positions
        return torch.cat([self.values, self.settled]), torch.cat([self.positions, self.settled_positions])
