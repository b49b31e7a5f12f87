"""Measures of a spectrum: functions of the singular values s (m,), falling."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import WeftError

__all__ = ["effective_rank", "energy_curve", "nuclear_norm", "rank_for_energy", "stable_rank"]


def stable_rank(s: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 = sum(s^2) / s_1^2, between 1 and the rank; 0 for a zero or empty matrix."""
    p = _shares(s)
    return float(1 / p[0]) if p.numel() and p[0] > 0 else 0.0


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli, 2007), between 1 and the rank; 0 for a zero or empty one."""
    s = s.double()
    total = s.sum()
    if not total > 0:
        return 0.0
    return float(torch.special.entr(s / total).sum().exp())


def nuclear_norm(s: Tensor) -> float:
    """sum(s)."""
    return float(s.double().sum())


def energy_curve(s: Tensor) -> Tensor:
    """The share of sum(s^2) that the first 1, 2, ... m values hold: (m,) fp64, rising to 1; zeros for a zero matrix."""
    return _shares(s).cumsum(0)


def rank_for_energy(s: Tensor, share: float) -> int:
    """The smallest r whose energy reaches `share` (0 to 1) of the whole; 0 for a zero or empty matrix.

    Raises:
        ValueError: share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise WeftError(f"An energy share lies between 0 and 1, got {share}")
    curve = energy_curve(s)
    if curve.numel() == 0 or curve[-1] == 0 or share == 0:
        return 0
    # rounding leaves the last entry a few ulp off 1
    reached = curve >= min(share, float(curve[-1])) - 1e-15
    return int(reached.int().argmax()) + 1


def _shares(s: Tensor) -> Tensor:
    s = s.double()
    if s.numel() == 0 or not s.amax() > 0:
        return torch.zeros_like(s)
    energy = (s / s.amax()).square()
    return energy / energy.sum()
