"""Whitening: a square root L of a second moment C (n, n), L L^T = C + ridge, and solves with it.

The ridge is relative: `ridge` times the mean of C's diagonal, so that it means the same for every layer and every
number of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Root", "finite", "moment_root"]


class Root(NamedTuple):
    """L (n, n) with L L^T = C + ridge: lower triangular, or Q diag(sqrt(l)) of its eigenvectors where C is singular."""

    factor: Tensor  # (n, n)
    triangular: bool

    def solve(self, right: Tensor) -> Tensor:
        """L^-1 R for R (n, k); the pseudo-inverse where L is singular."""
        if self.triangular:
            return torch.linalg.solve_triangular(self.factor, right, upper=False)
        return self._inverse_scale() * (self.factor.mT @ right)

    def solve_transposed(self, right: Tensor) -> Tensor:
        """L^-T R for R (n, k); the pseudo-inverse where L is singular."""
        if self.triangular:
            return torch.linalg.solve_triangular(self.factor.mT, right, upper=True)
        return self.factor @ (self._inverse_scale() * right)

    def _inverse_scale(self) -> Tensor:
        # columns of Q diag(sqrt(l)) are orthogonal with squared norm l: L^+ = diag(1/l) L^T
        size = self.factor.square().sum(0)
        keep = size > size.amax() * size.numel() * torch.finfo(size.dtype).eps
        return torch.where(keep, 1 / size, torch.zeros_like(size)).unsqueeze(1)


def moment_root(moment: Tensor, *, ridge: float = 0.0) -> Root:
    """A square root of C (n, n), symmetric and positive semi-definite: Cholesky in fp64, or eigenvectors if singular.

    Args:
        ridge: added to the diagonal, in units of the diagonal's mean.

    Raises:
        ValueError: C is not square, or holds NaN or infinity.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"a second moment is square, got {tuple(moment.shape)}")
    C = finite(moment)
    C = (C + C.mT) / 2
    if ridge and C.numel():
        C = C + torch.eye(len(C), dtype=C.dtype, device=C.device) * (ridge * C.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(C)
    if not bool(failed) and _well_conditioned(factor):
        return Root(factor, True)
    values, Q = torch.linalg.eigh(C)
    return Root(Q * values.clamp(min=0).sqrt(), False)


def finite(moment: Tensor) -> Tensor:
    """A second moment, or its diagonal, in fp64. Raises ValueError if it holds NaN or infinity."""
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment holds NaN or infinity")
    return moment.double()


def _well_conditioned(factor: Tensor) -> bool:
    """Whether a triangular solve means anything: a singular matrix can have a Cholesky with noise on its diagonal."""
    diagonal = factor.diagonal()
    if diagonal.numel() == 0:
        return True
    # squared pivots below n * eps of the largest are rounding, not data
    noise = diagonal.numel() * torch.finfo(factor.dtype).eps
    return bool(diagonal.square().amin() > noise * diagonal.square().amax())
