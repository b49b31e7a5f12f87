"""Allocations: (what is known of each layer, budget) -> ranks. One file each; `ALLOCATIONS` holds them by name.

A module here gives `allocate(layers, budget, *, multiple, ...) -> Ranks` and `READS`, the fields of `LayerInfo` it
looks at (and "measure", when it wants to try ranks on the model).
"""

from __future__ import annotations

from types import ModuleType

from weft.allocate import asvd, best, energy, uniform, welore
from weft.allocate.base import Allocation, Budget, LayerInfo, Ranks

__all__ = ["ALLOCATIONS", "NEEDS", "Allocation", "Budget", "LayerInfo", "Ranks"]

ALLOCATIONS: dict[str, ModuleType] = {
    "uniform": uniform,
    "energy": energy,
    "welore": welore,
    "asvd": asvd,
    "best": best,
}

NEEDS: dict[str, tuple[str, ...]] = {"losses": ("input_moment", "output_grad_moment")}
"""The statistics that a field of `LayerInfo` is computed from, beyond those of the method."""
