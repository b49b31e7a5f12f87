"""soma: start the factors on the r smallest singular triplets and freeze the rest (Yun et al., 2024, arXiv
2412.04077, section 3.2).

    W = U S V;   B0 = U_min sqrt(S_min / s),  A0 = sqrt(S_min / s) V_min;   W + s (B A - B0 A0)
    r (in + out) trainable numbers, and biases

The first blocks (`skip`, a third of them) get no adapter, the biases of the adapted layers are trained, and weight
decay is annealed by a cosine. MiLoRA is the same start for language models (`skip=0, biases=False, decay=0`).
Deviations: the decay is annealed over the run (or `steps`) with the paper's polynomial learning rate, lr (1 - t /
steps)^0.9, whatever the run's own schedule; no half rate for a backbone and no moving average of the weights, which
belong to the trainer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weft.linalg.svd import minor_svd
from weft.methods.adapter import SCALING, Pair, lora_count, low_rank
from weft.methods.base import Method, Moments, Site
from weft.rules.annealed_decay import AnnealedDecay

__all__ = ["METHOD", "initialise", "spread"]


def initialise(site: Site, scale: float, **_: Any) -> Pair:
    """The minor triplets, in fp64: close small values need digits."""
    U, s, V = minor_svd(site.weight(), site.rank)
    root = (s / scale).sqrt()
    return U * root, root.unsqueeze(1) * V


def spread(
    moments: Mapping[str, Moments], shapes: Mapping[str, tuple[int, int]], rank: int, options: Mapping[str, Any]
) -> dict[str, int]:
    """No adapter in the first blocks: a layer's block is the first number in its name."""
    numbers = {name: re.search(r"(?:^|\.)(\d+)\.", name) for name in shapes}
    blocks = {name: int(found[1]) for name, found in numbers.items() if found}
    first = int((max(blocks.values(), default=-1) + 1) * options["skip"])
    return {name: 0 if blocks.get(name, first) < first else rank for name in shapes}


def extras(layers: Sequence[str], names: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The biases of the adapted layers."""
    wanted = {f"{layer}.bias" for layer in layers} if options["biases"] else set()
    return [name for name in names if name in wanted]


METHOD = Method(
    name="soma",
    kind="adapt",
    summary="LoRA started on the smallest singular triplets of the weight, which leave the frozen base.",
    paper="Yun et al., 2024, arXiv 2412.04077",
    split=low_rank(initialise, shifted=True),
    count=lora_count,
    spread=spread,
    extras=extras,
    rules=(AnnealedDecay,),
    defaults={**SCALING, "skip": 1 / 3, "biases": True, "decay": 0.05, "steps": None, "lr": None},
)
