"""increlora: every layer starts at rank 1, and the layers that matter most gain components during training (Zhang et
al., 2023, arXiv 2308.12043).

    y = W x + scale U (s * (V x)),  scale = alpha / r;  U, V ~ N(0, 0.02^2), s = 0, and 1e-5 for `increment` in reserve
    growth and score: see `weft.rules.rank_growth`; the total is r times the number of layers
    trained, on average over the layers: r (in + out + 1) numbers

The trained numbers have moments and ages of their own (`EntryAdamW`); the tensors have room for min(ceiling r, out, in)
components a layer, of which only live ones are exported. What is new is brought to the full learning rate over `ramp`
steps (None: `interval`). By default an eighth of the layers grows at once and growth is complete after a third of the
run, as in the published runs on RTE (top_h 9 of 72 layers, warmup and interval 100 of 3,900 steps); on MNLI these are
2, 1000 and 1000 of 110,000.
Deviations: the scale does not jump as alpha / (live rank) does at each growth, so that growing changes no output; the
components live in tensors of capacity c, so that a run is resumed, compiled and sharded like any other; growth stops
exactly at the total, and of equal scores the first layer wins; the orthonormality holds between the components of a
layer, where the released code, one parameter a component, only pulls their norms to 1. On shards (FSDP2) AdamW takes
the steps: components then share one age, and only `ramp` softens the first steps of a new one. The scale is 1 unless
`alpha` is given, published are alpha 16 at a mean rank of 2 and 32 at 8, with a dropout of 0.2, which is left out. The
pull towards orthogonal sides is added to the gradients after they are clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.methods.adapter import lora_count, scale_of
from weft.methods.base import Method, Site, Split
from weft.optim.entries import EntryAdamW
from weft.rules.rank_growth import RESERVE, Growth, RankGrowth
from weft.terms import Spectral

__all__ = ["METHOD", "split"]


def split(site: Site, *, alpha: float | None, start: int, increment: int | None, ceiling: float, **_: Any) -> Split:
    """Random sides between which nothing, or nearly nothing, stands."""
    if not 1 <= start <= site.rank:
        raise WeftError(f"Layers start with {start} components and shall have {site.rank}; give start= from 1 to that.")
    out_features, in_features = site.shape
    capacity = _capacity(out_features, in_features, site.rank, {"ceiling": ceiling})
    U, V = (torch.randn(n, capacity, generator=site.generator) * 0.02 for n in (out_features, in_features))
    s = torch.zeros(capacity)
    s[start : start + Growth(increment=increment).gain(site.nominal)] = RESERVE if start < site.rank else 0
    factors = (factor.to(site.device, site.dtype) for factor in (U, s, V.mT))
    return Split({"": Spectral.from_factors(*factors, scale=scale_of(site.nominal, alpha=alpha))})


def _capacity(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return min(max(int(options["ceiling"] * rank), rank), out_features, in_features)


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return lora_count(out_features, in_features, rank, options) + rank


def _held(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    capacity = _capacity(out_features, in_features, rank, options)
    return lora_count(out_features, in_features, capacity, options) + capacity


def _optimizer(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    return torch.optim.AdamW(groups) if sharded else EntryAdamW(groups, eps=1e-8)


def _rule(
    rank: int,
    ranks: Mapping[str, int],
    start: int,
    increment: int | None,
    top_h: int | None,
    warmup: int | None,
    interval: int | None,
    ramp: int | None,
    smoothing: float,
    coefficient: float,
) -> RankGrowth:
    growth = Growth(start, increment, top_h, warmup, interval, ramp, smoothing, coefficient)
    return RankGrowth(growth, rank=rank, ranks=ranks)


METHOD = Method(
    name="increlora",
    kind="adapt",
    summary="Layers start at rank 1 and gain components, trained in advance, where the loss is most sensitive.",
    paper="Zhang et al., 2023, arXiv 2308.12043",
    split=split,
    count=_count,
    held=_held,
    rules=(_rule,),
    optimizer=_optimizer,
    defaults={
        "alpha": None,
        "start": 1,
        "increment": None,
        "top_h": None,
        "warmup": None,
        "interval": None,
        "ramp": None,
        "smoothing": 0.85,
        "coefficient": 0.1,
        "ceiling": 4.0,
    },
)
