"""AdaGrad as inner rules: an accumulator an entry, or one a weight.

`R (k, n, r)` is the gradient, as in `weft.optim.inner`. Accumulators only grow, so they are kept in fp32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.optim.base import Field, Inner, Matrix, Move, Rows, Scalar, State

__all__ = ["AdaGrad", "AdaGradNorm"]


def _high(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class AdaGrad(Inner):
    """a <- a + R^2, N = R / (sqrt(a) + eps), as in torch.optim.Adagrad (Duchi et al. 2011). State: n r numbers."""

    eps: float = 1e-10

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"sum": Field((matrix.rows, matrix.cols), _high(matrix.dtype), rows=True)}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        R = R.to(state["sum"].dtype)
        state["sum"].addcmul_(R, R)
        return R / state["sum"].sqrt().add_(self.eps), 1.0

    def transfer(self, state: State, move: Move) -> None:
        state["sum"].copy_(move(state["sum"], 2))


@dataclass(frozen=True)
class AdaGradNorm(Inner):
    """a <- a + ||R||^2, N = R / (sqrt(a) + eps), with one number a for a weight.

    Source: Ward, Wu and Bottou, 2019, arXiv 1806.01811.
    Deviations: a number for each weight, not one for the model.
    """

    eps: float = 1e-10
    rowwise: ClassVar[bool] = False

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"sum": Field((1, 1), _high(matrix.dtype))}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        R = R.to(state["sum"].dtype)
        state["sum"].add_(rows.norm(R).square())
        return R / (state["sum"].sqrt() + self.eps), 1.0

    def transfer(self, state: State, move: Move) -> None:
        return None  # a length is the same in every basis
