"""Dense: the plain matrix W (out, in) as a term, e.g. a frozen base under an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.lean_linear import Weight
from weft.tensors import plain_values
from weft.terms.base import Term

__all__ = ["Dense", "sum_dense"]


class Dense(Term):
    """T = W, one stored number an entry."""

    kind = "dense"

    def __init__(
        self, in_features: int, out_features: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features)
        self.matrix = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Dense:
        """The term that holds `matrix` (out, in), sharing its memory when it is contiguous."""
        term = cls(matrix.shape[1], matrix.shape[0], device="meta", dtype=matrix.dtype)
        term.matrix = nn.Parameter(matrix.detach().contiguous())
        return term

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return plain_values(self.matrix).to(dtype or self.matrix.dtype)

    def lean_weight(self) -> Weight | None:
        return self.matrix


def sum_dense(terms: Iterable[Term]) -> Tensor:
    """The sum of the terms' matrices in fp32: (out, in)."""
    first, *rest = (term.dense(torch.float32).detach() for term in terms)
    return sum(rest, start=first)
