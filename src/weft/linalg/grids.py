"""Rounding to numbers that are known by now, many times over: evenly spaced ones, or those of a table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grids", "Levels"]

_STEP = 8.0
"""Between the tables of `Levels` on their one line: numbers in units of a group's scale are cut at 2."""


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

    @property
    def fields(self) -> Tensor:
        """What an entry has, one below the other: (fields, ...)."""
        return torch.stack(list(self))

    def like(self, fields: Tensor) -> Grids:
        """Others, of such fields."""
        return Grids(*fields)

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest codes, counted from the zero point."""
        return (numbers / self.divisor).round_().clamp_(self.least, self.most)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return codes * self.scale


class Levels(NamedTuple):
    """Of groups of numbers, an entry a group: the numbers table[code] * scale, the table one of a few."""

    scale: Tensor
    divisor: Tensor  # the scale, or 1 where that is 0
    which: Tensor  # the number of the table, in the dtype of the scale
    tables: Tensor  # (tables, K) each sorted, of numbers from -2 to 2; shorter ones end in repetitions
    edges: Tensor  # (tables (K - 1),) sorted: what is halfway between two levels, tables `_STEP` apart

    @classmethod
    def of(cls, scale: Tensor, which: Tensor, tables: Tensor) -> Levels:
        """Those of scales and numbers of tables (...)."""
        below, middles = tables[:, :-1], (tables[:, 1:] + tables[:, :-1]) / 2
        middles = torch.where(below < tables[:, -1:], middles, _STEP / 2)  # repetitions are nobody's nearest
        apart = _STEP * torch.arange(len(tables), device=tables.device, dtype=tables.dtype).unsqueeze(1)
        edges = (middles + apart).flatten().to(scale.dtype)
        return cls(scale, torch.where(scale > 0, scale, 1.0), which.expand_as(scale), tables.to(scale.dtype), edges)

    @property
    def fields(self) -> Tensor:
        """What an entry has, one below the other: (fields, ...)."""
        return torch.stack([self.scale, self.divisor, self.which])

    def like(self, fields: Tensor) -> Levels:
        """Others, of such fields."""
        return Levels(fields[0], fields[1], fields[2], self.tables, self.edges)

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest codes."""
        units = (numbers / self.divisor).clamp_(-2, 2)
        at = torch.bucketize(units.add_(self.which, alpha=_STEP), self.edges, right=True)
        return at - self.which * (self.tables.shape[1] - 1)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return self.tables.take((self.which * self.tables.shape[1] + codes).long()) * self.scale
