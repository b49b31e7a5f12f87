"""Grafts: methods that change a forward pass rather than a weight. One file each; `GRAFTS` holds them by name."""

from __future__ import annotations

from weft.grafts import lst, ntk_attention, quantizable_attention
from weft.grafts.base import Graft
from weft.records import Table

__all__ = ["GRAFTS", "Graft"]

GRAFTS = Table(
    Graft,
    (
        module.GRAFT
        for module in (
            lst,
            ntk_attention,
            quantizable_attention,
        )
    ),
)
