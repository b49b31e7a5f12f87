"""bone: one small matrix shared by all shards of the weight, zero at the start (Kang, 2024, arXiv 2409.15371; the later
versions of the paper, and PEFT, call it MiSS).

    "balance"  y = W x + D^T (sum of the shards of x of length r),     D (r, out);           r out trainable numbers
    "mini"     the same with D (r, mini_r), repeated along the output;                       r mini_r
    "bat"      W_ij (I + D_i) + D_i for every r x r block of W,        D (out / r, r, r);    r out

`rank` is the side r (the paper: 64), the last shard is filled up with zeros. "balance" is LoRA with a fixed binary A
that nobody stores: it averages input features that lie r apart, so their order matters. "bat", the block affine form
that the title of the first version means, is no sum of W and a constant: it transforms the whole weight, and costs a
temporary as large as W. There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from weft.errors import WeftError, unknown
from weft.methods.base import Method, Site, Split
from weft.terms import BlockAffine, ShardSum

__all__ = ["METHOD", "split"]

VARIANTS = ("balance", "mini", "bat")


def split(site: Site, *, variant: str, mini_r: int) -> Split:
    """D = 0."""
    out_features, in_features = site.shape
    place: dict[str, Any] = {"device": site.device, "dtype": site.dtype}
    if variant == "bat":
        _check_divides(site, "in", in_features, site.rank)
        _check_divides(site, "out", out_features, site.rank)
        term: BlockAffine | ShardSum = BlockAffine(in_features, out_features, site.rank, **place)
    elif variant in VARIANTS:
        columns = mini_r if variant == "mini" else out_features
        _check_divides(site, "out", out_features, columns)
        term = ShardSum(in_features, out_features, site.rank, columns, **place)
    else:
        raise unknown("variant of bone", variant, VARIANTS)
    nn.init.zeros_(term.D)
    return Split({"": term})


def _check_divides(site: Site, side: str, size: int, part: int) -> None:
    if part < 1 or size % part:
        raise WeftError(
            f"The blocks of {part} do not divide the {side} side of {site.name} ({size}); choose another rank= or "
            "mini_r=, leave the layer out with targets=, or take variant='balance'."
        )


def limit(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """A shard is at most the input."""
    return min(out_features, in_features) if options["variant"] == "bat" else in_features


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return rank * (options["mini_r"] if options["variant"] == "mini" else out_features)


METHOD = Method(
    name="bone",
    kind="adapt",
    summary="One small matrix shared by all shards of the input (MiSS), or applied to every block of the weight (BAT).",
    paper="Kang, 2024, arXiv 2409.15371",
    split=split,
    count=_count,
    limit=limit,
    least={"mini_r": 1},
    defaults={"variant": "balance", "mini_r": 1},
)
