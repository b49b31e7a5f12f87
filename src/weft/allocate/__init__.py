"""Allocations: (what is known of each layer, budget in bytes) -> choices. One file each; `ALLOCATIONS` holds their
records by name.
"""

from __future__ import annotations

from weft.allocate import (
    asvd,
    best,
    energy,
    equal,
    lems,
    llama_nas,
    lrp_pruning,
    modegpt,
    quantune,
    uniform,
    welore,
)
from weft.allocate.allocation import Allocation
from weft.allocate.base import Allocator, Budget, Choice, Choices, LayerInfo, Shape
from weft.records import Table

__all__ = ["ALLOCATIONS", "NEEDS", "Allocation", "Allocator", "Budget", "Choice", "Choices", "LayerInfo", "Shape"]

_PAGES = (uniform, equal, energy, welore, asvd, best, modegpt, lrp_pruning, llama_nas, quantune, lems)

ALLOCATIONS = Table(Allocator, [*(page.ALLOCATION for page in _PAGES), lems.SEARCHED])

NEEDS: dict[str, tuple[str, ...]] = {"losses": ("input_moment", "output_grad_moment")}
"""The statistics that what an allocation reads is computed from, beyond those of the method."""
