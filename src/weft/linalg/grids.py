"""Rounding to grids of evenly spaced numbers that are known by now, many times over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grids"]


class Grids(NamedTuple):
    """Of groups of numbers, an entry a group: the numbers c * scale, c whole from `least` to `most`."""

    scale: Tensor
    divisor: Tensor  # the scale, or 1 where that is 0
    least: Tensor  # codes, counted from the zero point
    most: Tensor

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor, bits: int | Tensor) -> Grids:
        """Those of scales, zero points and widths (..., 1)."""
        ends = torch.where(scale > 0, scale, 1.0), -zero, 2**bits - 1 - zero
        return cls(*(t.squeeze(-1) for t in (scale, *ends)))

    @property
    def zero(self) -> Tensor:
        """The codes of 0."""
        return -self.least

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest codes, counted from the zero point."""
        return (numbers / self.divisor).round_().clamp_(self.least, self.most)

    def at(self, rows: slice) -> Grids:
        """Those of a range of the second dimension."""
        return Grids(*(t[:, rows] for t in self))
