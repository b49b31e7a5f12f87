"""compacter: bottleneck adapters after each sublayer, their matrices sums of Kronecker products with factors that the
whole model shares (Karimi Mahabadi et al., 2021, arXiv 2106.04647, sections 3 and 4).

    h + U(gelu(D(h))) for the output h of a sublayer;   D, U: x -> x sum_{i <= n} A_i (x) (s_i t_i) + bias
    2 r_f (out + b) + out + b trainable numbers a layer for a bottleneck of width b, n^3 (A_1 ... A_n) once, norms
    s, t Glorot-uniform with gain sqrt(2), A ~ N(0, 1e-4^2), biases 0

`rank` is b (the paper: out / 32), which n must divide, as it must `out`. Adapted are, among the targets, the layers at
the end of a self-attention or a feed-forward sublayer; `attention=False` is Compacter++, the latter alone. All layer
norms of the model are trained along (`norms`). The start differs from the base by about the square of A's size, as much
as rounding in fp32. Not mergeable: it has a nonlinearity. The published learning rate is 3e-3, large for the gradient
passes three small factors. The adapter reads the output of the sublayer's last layer before dropout, as in the released
T5; another adapter beside it acts on that layer alone and is not seen by the bottleneck. FSDP2 needs to be told of the
shared matrices, see `weft.rules.replicated`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.methods.adapter import Common
from weft.methods.base import Method, Moments, Site, Split
from weft.rules.replicated import Replicated
from weft.terms import Bottleneck

__all__ = ["METHOD", "split", "sublayer_of"]

Shapes = Mapping[str, tuple[int, int]]

ATTENTION = {"o_proj", "out_proj", "o", "c_proj", "dense", "out_lin", "wo", "proj"}
FEED_FORWARD = {"down_proj", "fc2", "c_proj", "dense_4h_to_h", "wo", "w2", "lin2", "fc_out", "proj_out"}
CROSS = re.compile(r"cross|EncDec|encoder_attn", re.IGNORECASE)
NORM = re.compile(r"norm|^ln(_?\w+)?$", re.IGNORECASE)


def sublayer_of(name: str) -> str | None:
    """ "attention" or "feed-forward" for the layer whose output is that of a self-attention or feed-forward sublayer,
    told by the names that transformers' models use; None for all others.
    """
    *path, leaf = name.split(".")
    if any("att" in part.lower() for part in path):
        return "attention" if leaf in ATTENTION and not CROSS.search(name) else None
    return "feed-forward" if leaf in FEED_FORWARD or [*path[-1:], leaf] == ["output", "dense"] else None


def spread(moments: Mapping[str, Moments], shapes: Shapes, rank: int, options: Mapping[str, Any]) -> dict[str, int]:
    """The width at the end of each sublayer, 0 elsewhere."""
    wanted = {"feed-forward", "attention"} if options["attention"] else {"feed-forward"}
    widths = {name: rank if sublayer_of(name) in wanted else 0 for name in shapes}
    if not any(widths.values()):
        raise WeftError(
            f"None of the targets is known to end a sublayer ({', '.join(sorted(FEED_FORWARD))} ...), which is where "
            "compacter's adapters belong; name the layers with ranks={'layer': width}."
        )
    return widths


def share(shapes: Shapes, rank: int, generator: torch.Generator, options: Mapping[str, Any]) -> Common:
    """A (n, n, n), the same for every projection of the model."""
    n = options["n"]
    return Common(A=torch.randn(n, n, n, generator=generator) * 1e-4)


def split(site: Site, *, n: int, r_f: int, attention: bool, norms: bool) -> Split:
    """The adapter around the layer, holding the model's A."""
    out_features, in_features = site.shape
    if out_features % n or site.rank % n:
        raise WeftError(
            f"The output of {site.name} ({out_features}) and the bottleneck ({site.rank}) must be multiples of n = {n};"
            " choose another rank= or n=."
        )
    term = Bottleneck(in_features, out_features, site.rank, n, r_f, device=site.device, dtype=site.dtype)
    if site.bias is not None:
        term.offset = site.bias.clone()
    for projection in (term.down, term.up):
        projection.s, projection.t = (_glorot(p.shape, site) for p in (projection.s, projection.t))
        nn.init.zeros_(projection.bias)
    term.A = site.shared.on(site)["A"]
    return Split({"": term})


def _glorot(shape: torch.Size, site: Site) -> nn.Parameter:
    """U(-c, c), c = sqrt(2) sqrt(6 / (rows + columns)), for each of the n matrices."""
    bound = math.sqrt(12 / (shape[1] + shape[2]))
    drawn = (torch.rand(shape, generator=site.generator) * 2 - 1) * bound
    return nn.Parameter(drawn.to(site.device, site.dtype))


def extras(layers: Sequence[str], names: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The parameters of the model's layer norms."""
    return [name for name in names if options["norms"] and len(parts := name.split(".")) > 1 and NORM.search(parts[-2])]


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return (2 * options["r_f"] + 1) * (out_features + rank)


def _count_shared(shapes: Shapes, rank: int, options: Mapping[str, Any]) -> int:
    return int(options["n"] ** 3)


def limit(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """A bottleneck is no wider than what it reads."""
    return out_features


METHOD = Method(
    name="compacter",
    kind="adapt",
    summary="Nonlinear bottlenecks after each sublayer, made of Kronecker products with factors the model shares.",
    paper="Karimi Mahabadi et al., 2021, arXiv 2106.04647",
    split=split,
    count=_count,
    count_shared=_count_shared,
    limit=limit,
    share=share,
    spread=spread,
    extras=extras,
    rules=(Replicated,),
    exempt={"merges": "A bottleneck with a nonlinearity is no matrix that could be added to the weight."},
    least={"n": 1, "r_f": 1},
    defaults={"n": 4, "r_f": 1, "attention": True, "norms": True},
)
