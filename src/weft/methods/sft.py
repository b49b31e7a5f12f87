"""sft: a fixed number of entries of each weight, of which those that moved least are dropped now and then and others
grown where the gradient is large; SpIEL (Ansell et al., 2024, arXiv 2401.16405, sections 3.1 and 3.2).

    W' = W + scatter(v, J);   k = r (in + out), or `density` in out, trainable numbers v, zero at random J at the start
    every `interval` steps, after `phase` steps of looking: drop floor(p k) smallest |v|, grow as many
    p = 1 the first time, then rate (1 - t / steps);   phase 5, less in runs of fewer than 10 steps

`grow="ag"` (SpIEL-AG): the candidates are the k entries of largest gradient in one micro-batch, the grown those of
largest summed gradient over the phase; AdamW with an age of each entry, seeded with the means seen.
`grow="ma"` (SpIEL-MA): SM3 over the entries, and the grown are those of largest row times column accumulator.
Deviations: the dense gradient is seen one layer at a time and never held; sums are of whole steps (over micro-batches,
the mean over processes) and leave out the step that proposed, whose gradients are large by choice; ages are integers,
increased before they correct, where the released step is too large by up to 1.34; `density` is of the targeted weight,
by default a LoRA's budget, as in the paper's comparisons. Seeds do not know of gradient clipping. Under FSDP2
the optimizer of "ag" is torch's AdamW, whose newcomers start from zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split
from weft.methods.lift import entry_optimizer
from weft.methods.random_mask import entry_count, random_entries
from weft.optim.sm3 import SM3
from weft.rules.drop_and_grow import DropAndGrow, check_phase
from weft.terms import MovingSparse

__all__ = ["METHOD", "split"]


def split(site: Site, *, density: float | None, grow: str, interval: int, phase: int | None, **_: Any) -> Split:
    """Zeros at random entries."""
    check_phase(2 if phase is None else phase, interval)
    if grow not in ("ag", "ma"):
        raise WeftError(f"grow is {grow!r}: give 'ag' (summed gradients, AdamW) or 'ma' (SM3's accumulators).")
    return Split({"": MovingSparse.at(random_entries(site, density), *site.shape, dtype=site.dtype)})


def _optimizer(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    if options["grow"] == "ag":
        return entry_optimizer(groups, betas=(0.9, 0.999))
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise WeftError("SM3's rows and columns are of whole tensors, which FSDP2 shards; use grow='ag', or DDP.")
    return SM3(groups)


METHOD = Method(
    name="sft",
    kind="adapt",
    summary="Scattered entries of each weight; those that moved least make room for others of large gradient.",
    paper="Ansell et al., 2024, arXiv 2401.16405",
    split=split,
    count=entry_count,
    rules=(DropAndGrow,),
    optimizer=_optimizer,
    defaults={"density": None, "grow": "ag", "interval": 20, "phase": None, "rate": 0.2, "steps": None},
)
