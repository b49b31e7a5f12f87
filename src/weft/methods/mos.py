"""mos: all blocks put their LoRA factors together from one shared pool of vector pieces (Wang et al., 2024, arXiv
2410.00938, section 3).

    for each kind of layer (q, k, ...) of L blocks: pools of e L l pieces, A's of in / l numbers and B's of out / l
    row j of A, column j of B: l pieces each, by indices drawn once;   y = W x + (alpha / r) B A dropout(x)
    e L (in + out) trainable numbers a kind: those of a LoRA of rank e, the equivalent rank, for factors of rank r >= e

Of its r vectors a block owns `private_rank` pieces alone (privatisation); the rest it draws without replacement from
the public part, for A and B apart (pair dissociation). A starts at U(-1/sqrt(in), 1/sqrt(in)), B at 0. The paper says
neither p nor l of its runs: 1 and 4 are ours. `equivalent_rank` None is r / 4, as in its larger runs, or the least that
the blocks at hand allow (drawing without replacement needs r - p <= (e - p) L).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.methods.adapter import Common, kaiming, scale_of
from weft.methods.base import Method, Site, Split
from weft.rules.replicated import Replicated
from weft.terms import PooledLowRank

__all__ = ["METHOD", "Pool", "equivalent_rank", "kinds", "share", "split"]

Shapes = Mapping[str, tuple[int, int]]


class Pool(NamedTuple):
    """The pieces of one kind of layer, and which of them each layer takes."""

    name: str
    pieces: Common  # A (e L l, in / l) and B (e L l, out / l)
    indices: dict[str, tuple[Tensor, Tensor]]  # layer -> (r l,) each, of A and of B
    rows: int  # e L l
    rank: int


def share(shapes: Shapes, rank: int, generator: torch.Generator, options: Mapping[str, Any]) -> dict[str, Pool]:
    """layer -> the pool of its kind, with every layer's indices."""
    e, shards = equivalent_rank(shapes, rank, options), options["shards"]
    found: dict[str, Pool] = {}
    for name, layers in kinds(shapes).items():
        _check(shapes, layers, rank, e, options)
        out_features, in_features = shapes[layers[0]]
        rows = e * len(layers) * shards
        A = kaiming(rows, in_features // shards, generator) / math.sqrt(shards)  # the fan is the whole vector's
        B = torch.zeros(rows, out_features // shards)
        indices = _indices(layers, rank, e, shards, options["private_rank"], generator)
        pool = Pool(name, Common(A=A, B=B), indices, rows, rank)
        found |= dict.fromkeys(layers, pool)
    return found


def kinds(shapes: Shapes) -> dict[str, list[str]]:
    """Kind of layer -> its layers: equal names but for the numbers in them, and equal shapes."""
    found: dict[str, list[str]] = {}
    for layer, shape in shapes.items():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)
        found.setdefault(f"{pattern} {shape[0]}x{shape[1]}", []).append(layer)
    return found


def equivalent_rank(shapes: Shapes, rank: int, options: Mapping[str, Any]) -> int:
    """e: the option, or r / 4, or the least from which r vectors can be drawn for the kind of the fewest layers."""
    if options["equivalent_rank"] is not None:
        return int(options["equivalent_rank"])
    fewest, private = min(map(len, kinds(shapes).values())), options["private_rank"]
    return max(-(-rank // 4), private - (private - rank) // fewest)


def split(
    site: Site, *, equivalent_rank: int | None, private_rank: int, shards: int, alpha: float | None, dropout: float
) -> Split:
    """The layer's own indices into the pool of its kind."""
    pool: Pool = site.shared[site.name]
    if site.rank != pool.rank:
        raise WeftError(
            f"MoS draws {pool.rank} vectors for each layer of a kind, and {site.name} is given rank {site.rank}; give "
            "all layers one rank."
        )
    out_features, in_features = site.shape
    scale = scale_of(site.rank, alpha=alpha)
    term = PooledLowRank(
        *(in_features, out_features, site.rank, pool.rows, shards),
        pool=pool.name,
        scale=scale,
        dropout=dropout,
        device="meta",
    )
    pieces = pool.pieces.on(site)
    term.pool_A, term.pool_B = pieces["A"], pieces["B"]
    term.index_A, term.index_B = (index.to(site.device) for index in pool.indices[site.name])
    return Split({"": term})


def _indices(
    layers: list[str], rank: int, e: int, shards: int, private: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Public pieces by a permutation for A and one for B, then the layer's own pieces, the same for both."""
    public, taken = (e - private) * len(layers) * shards, (rank - private) * shards
    found = {}
    for block, layer in enumerate(layers):
        own = public + torch.arange(block * private * shards, (block + 1) * private * shards)
        drawn = [torch.randperm(public, generator=generator)[:taken] for _ in "AB"]
        found[layer] = (torch.cat([drawn[0], own]), torch.cat([drawn[1], own]))
    return found


def _check(shapes: Shapes, layers: list[str], rank: int, e: int, options: Mapping[str, Any]) -> None:
    """Raises WeftError where the pool cannot be cut or drawn from."""
    shards, private = options["shards"], options["private_rank"]
    out_features, in_features = shapes[layers[0]]
    if shards < 1 or in_features % shards or out_features % shards:
        raise WeftError(
            f"The vectors of {layers[0]} ({out_features} x {in_features}) cannot be cut into {shards} equal pieces; "
            "give shards= a common divisor of both sides."
        )
    if not 0 <= private <= min(e, rank) or rank - private > (e - private) * len(layers):
        least = private - (private - rank) // len(layers)
        raise WeftError(
            f"A pool of equivalent rank {e} with {private} private for {len(layers)} layers like {layers[0]} does not "
            f"hold {rank} different vectors for each; give equivalent_rank={least} or more, a lower rank, or a "
            f"private_rank from 0 to {min(e, rank)}."
        )


def _no_own(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return 0  # everything trained is in the pools


def _count_pools(shapes: Shapes, rank: int, options: Mapping[str, Any]) -> int:
    return equivalent_rank(shapes, rank, options) * sum(map(sum, shapes.values()))


METHOD = Method(
    name="mos",
    kind="adapt",
    summary="LoRA factors of a high rank put together from a pool of vector pieces that all blocks share.",
    paper="Wang et al., 2024, arXiv 2410.00938",
    split=split,
    share=share,
    count=_no_own,
    count_shared=_count_pools,
    rules=(Replicated,),
    defaults={"equivalent_rank": None, "private_rank": 1, "shards": 4, "alpha": 16.0, "dropout": 0.1},
)
