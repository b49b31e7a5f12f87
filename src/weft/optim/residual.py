"""What becomes of the gradient outside the subspace: a plain step, its sign, or a step scaled as Adam would (Fira,
APOLLO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from weft.optim.base import Frame, Residual, Rows, Scalar

__all__ = ["NormScaled", "Plain", "Sign"]


@dataclass(frozen=True)
class Plain(Residual):
    """SGD: scale * (X - up(R))."""

    scale: float = 1.0

    def term(self, X: Tensor, R: Tensor, N: Tensor, frame: Frame, rows: Rows) -> tuple[Tensor, Scalar]:
        return frame.rest(X, R), self.scale


@dataclass(frozen=True)
class Sign(Residual):
    """signSGD: scale * sign(X - up(R)), with sign(0) = 0 (FRUGAL, arXiv 2411.07837).

    Coordinates that the subspace holds give exactly 0. For other bases the difference is rounded, and where it is not
    above the rounding of X itself it counts as 0: its sign would be noise.
    """

    scale: float = 1.0

    def term(self, X: Tensor, R: Tensor, N: Tensor, frame: Frame, rows: Rows) -> tuple[Tensor, Scalar]:
        E = frame.rest(X, R)
        return torch.where(E.abs() > torch.finfo(X.dtype).eps * X.abs(), E, 0).sign(), self.scale


@dataclass(frozen=True)
class NormScaled(Residual):
    """phi * (X - subtract * up(R)), where phi = ||N|| / (||R|| + 1e-8) a row ("channel") or a matrix ("tensor").

    subtract: 1 is the Fira paper's residual; Fira's code subtracts the back-projection already multiplied by its scale
    (arXiv 2410.01623); 0 keeps the whole gradient, which with `scale=0` for the inside is APOLLO (arXiv 2412.05270).
    """

    subtract: float = 1.0
    granularity: Literal["channel", "tensor"] = "channel"
    scale: float = 1.0
    corrected: ClassVar[bool] = True

    @property
    def keeps_gradient(self) -> bool:
        return self.subtract == 0

    def term(self, X: Tensor, R: Tensor, N: Tensor, frame: Frame, rows: Rows) -> tuple[Tensor, Scalar]:
        E = X if self.subtract == 0 else frame.rest(X, R, self.subtract)
        if self.granularity == "tensor":
            return E, self.scale * rows.norm(N) / (rows.norm(R) + 1e-8)
        return E, self.scale * _row_norm(N) / (_row_norm(R) + 1e-8)


def _row_norm(x: Tensor) -> Tensor:
    """(k, n, r) -> (k, n, 1), in fp32 or fp64."""
    high = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=high)
    return norms
