"""randlora: a full-rank update, a sum of products of random matrices that all layers share, of which only diagonal
scalings are trained (Albert et al., 2025, arXiv 2502.00987, equation 4).

    dW = alpha / (r sqrt(N)) sum_n B_n diag(Lambda_n) A diag(Gamma_n),  n = 1 .. N = ceil(min(out, in) / r)
    N (r + min) trainable numbers a layer: fewer for a larger rank
    Lambda = 0, Gamma = 1 / max(N, min) at the start;  B_n and A random, divided by their standard deviation

The scale is that of the authors' code, whose alpha is 2 r; PEFT's is alpha / r with alpha 640 at r 32. One store of B_n
and A for the whole model, sliced to each layer, is computed from a seed and not saved.
Deviations: every column of B_n meets its own row of A; PEFT flattens them in two orders, so its tensors mean another
(equally random) map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split
from weft.methods.nola import seed_of
from weft.terms import RandomProducts, RandomStore

__all__ = ["METHOD", "share", "split"]


def share(
    shapes: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator, options: Mapping[str, Any]
) -> RandomStore:
    """The store that the largest sides need."""
    short, long = max(map(min, shapes.values())), max(map(max, shapes.values()))
    return RandomStore(seed_of(generator), rank, -(-short // rank), long, short, options["law"])


def split(site: Site, *, alpha: float | None, law: str) -> Split:
    """Scalings of zero on one side, of a small constant on the other."""
    if site.rank != site.shared.rank:
        raise WeftError(
            f"RandLoRA cuts every layer's matrices from one store of rank {site.shared.rank}, and {site.name} is given "
            f"rank {site.rank}; give all layers one rank."
        )
    out_features, in_features = site.shape
    products = -(-min(site.shape) // site.rank)
    scale = (2 * site.rank if alpha is None else alpha) / (site.rank * math.sqrt(products))
    term = RandomProducts(in_features, out_features, site.shared, scale=scale, device=site.device, dtype=site.dtype)
    nn.init.zeros_(term.Lambda)
    nn.init.constant_(term.Gamma, 1 / max(term.Gamma.shape))
    return Split({"": term})


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    short = min(out_features, in_features)
    return -(-short // rank) * (rank + short)


METHOD = Method(
    name="randlora",
    kind="adapt",
    summary="A full-rank sum of random products shared by all layers; only diagonal scalings are trained.",
    paper="Albert et al., 2025, arXiv 2502.00987",
    split=split,
    share=share,
    count=_count,
    defaults={"alpha": None, "law": "uniform"},
)
