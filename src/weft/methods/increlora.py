"""increlora: every layer starts at rank 1, and the layers that matter most gain components during training (Zhang et
al., 2023, arXiv 2308.12043).

    y = W x + scale U (s * (V x)),  scale = alpha / r;  U, V ~ N(0, 0.02^2), s = 0, and 1e-5 for `increment` in reserve
    growth and score: see `weft.rules.rank_growth`; the total is r times the number of layers
    capacity c = min(ceiling r, out, in) components a layer;   c (in + out + 1) trainable numbers

Of them those of live and reserved components are trained, with moments and ages of their own (`EntryAdamW`); only live
ones are exported. What is new is brought to the full learning rate over `ramp` steps (None: `interval`). The defaults
are those of the paper's longest task; for short runs lower `warmup` and `interval`.
Deviations: the scale does not jump as alpha / (live rank) does at each growth, so that growing changes no output; the
components live in tensors of capacity c, so that a run is resumed, compiled and sharded like any other; growth stops
exactly at the total, and of equal scores the first layer wins; the orthonormality holds between the components of a
layer, where the released code, one parameter a component, only pulls their norms to 1. On shards (FSDP2) AdamW takes
the steps: components then share one age, and only `ramp` softens the first steps of a new one.
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


def split(site: Site, *, alpha: float | None, start: int, ceiling: float, **options: Any) -> Split:
    """Random sides between which nothing, or nearly nothing, stands."""
    if not 1 <= start <= site.rank:
        raise WeftError(f"Layers start with {start} components and shall have {site.rank}; give start= from 1 to that.")
    out_features, in_features = site.shape
    capacity = _capacity(out_features, in_features, site.rank, {"ceiling": ceiling})
    U, V = (torch.randn(n, capacity, generator=site.generator) * 0.02 for n in (out_features, in_features))
    s = torch.zeros(capacity)
    s[start : start + _growth(start=start, **options).gain(site.nominal)] = RESERVE if start < site.rank else 0
    factors = (factor.to(site.device, site.dtype) for factor in (U, s, V.mT))
    return Split({"": Spectral.from_factors(*factors, scale=scale_of(site.nominal, alpha=alpha))})


def _capacity(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return min(max(int(options["ceiling"] * rank), rank), out_features, in_features)


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    capacity = _capacity(out_features, in_features, rank, options)
    return lora_count(out_features, in_features, capacity, options) + capacity


def _optimizer(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    return torch.optim.AdamW(groups) if sharded else EntryAdamW(groups, eps=1e-8)


def _growth(*, interval: int, ramp: int | None, **options: Any) -> Growth:
    settings = {key: value for key, value in options.items() if key in Growth.__dataclass_fields__}
    return Growth(interval=interval, ramp=interval if ramp is None else ramp, **settings)


def _rule(*, adapter: str, **options: Any) -> RankGrowth:
    return RankGrowth(adapter, _growth(**options))


METHOD = Method(
    name="increlora",
    kind="adapt",
    summary="Layers start at rank 1 and gain components, trained in advance, where the loss is most sensitive.",
    paper="Zhang et al., 2023, arXiv 2308.12043",
    split=split,
    count=_count,
    rules=(_rule,),
    optimizer=_optimizer,
    defaults={
        "alpha": None,
        "start": 1,
        "increment": None,
        "top_h": 2,
        "warmup": 1000,
        "interval": 1000,
        "ramp": None,
        "smoothing": 0.85,
        "coefficient": 0.1,
        "ceiling": 4.0,
    },
)
