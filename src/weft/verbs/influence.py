"""The influence of every site's block, for allocations that read it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from weft.runs.pieces import Store
from weft.stats.calibrate import Batch
from weft.stats.influence import block_influence
from weft.verbs.survey import Plan

__all__ = ["influence"]


def influence(model: nn.Module, plan: Plan, batches: Sequence[Batch], store: Store) -> dict[str, float]:
    """s of the block of every site; the mean of all blocks for what lies in none."""
    found = block_influence(model, batches, cache=store.directory)
    mean = sum(found.values()) / max(len(found), 1)
    return {site: next((s for block, s in found.items() if site.startswith(f"{block}.")), mean) for site in plan.sites}
