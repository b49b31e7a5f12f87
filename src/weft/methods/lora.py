"""lora: T = (alpha / r) B A beside the frozen weight (Hu et al., 2021, arXiv 2106.09685).

    A ~ U(-1/sqrt(in), 1/sqrt(in)),  B = 0;   y = W x + b + s B (A dropout(x));   r (in + out) trainable numbers

`rslora=True` is rsLoRA, s = alpha / sqrt(r) (Kalajdzievski, 2023, arXiv 2312.03732); `ratio=16` is LoRA+, B learns
`ratio` times faster than A (Hayou et al., 2024, arXiv 2402.12354).
Deviations: alpha defaults to the rank, so that the scale is 1 and the learning rate is the only rate (PEFT's default is
alpha 8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.methods.adapter import SCALING, Pair, kaiming, lora_count, low_rank
from weft.methods.base import Method, Site

__all__ = ["METHOD", "initialise"]


def initialise(site: Site, scale: float, *, gaussian: bool = False, **_: Any) -> Pair:
    """B = 0 and a random A: Kaiming uniform, or N(0, 1/r^2) for `gaussian` (PEFT's "gaussian"); rules take the rest."""
    out_features, in_features = site.shape
    if gaussian:
        A = torch.randn(site.rank, in_features, generator=site.generator) / site.rank
    else:
        A = kaiming(site.rank, in_features, site.generator)
    return torch.zeros(out_features, site.rank), A


def rates(options: Mapping[str, Any]) -> dict[str, float]:
    """LoRA+: the factor of B's learning rate."""
    return {"B": options["ratio"]}


METHOD = Method(
    name="lora",
    kind="adapt",
    summary="Low-rank adapter: a trainable product B A beside the frozen weight; rsLoRA and LoRA+ are options.",
    paper="Hu et al., 2021, arXiv 2106.09685",
    split=low_rank(initialise),
    count=lora_count,
    rates=rates,
    defaults={**SCALING, "gaussian": False, "ratio": 1.0},
)
