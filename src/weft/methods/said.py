"""said: fine-tune all layers through d numbers, by one fixed random projection a layer (Aghajanyan et al., 2020, arXiv
2012.13255, equations 2 and 3).

    W_i' = W_i + lambda_i P_i(theta);   theta in R^(d - m) shared by the m layers, one lambda_i each;   d numbers
    theta = 0, lambda = 1 at the start;  P_i is Fastfood, so that ||P_i(theta)|| is about ||theta||

`d` None is the rank times the number of layers. `structure_aware=False` is DID: no lambda, theta in R^d.
Deviations: the gradient is that of the map (the redistributed code divides it by the padded size of each tensor, so
that large ones are held back); a map pads to d where a layer has fewer entries, instead of dropping coordinates of
theta; only the targeted linear layers are projected, neither biases nor norms; the code counts one number less than the
paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.methods.adapter import Common, no_gradient
from weft.methods.base import Method, Site, Split
from weft.methods.nola import seed_of
from weft.rules.replicated import Replicated
from weft.terms import Projected

__all__ = ["METHOD", "share", "split"]

Shapes = Mapping[str, tuple[int, int]]


def share(shapes: Shapes, rank: int, generator: torch.Generator, options: Mapping[str, Any]) -> Common:
    """theta, zero. Raises WeftError where the scales leave nothing for it."""
    total = dimension(shapes, rank, options)
    width = total - len(shapes) if options["structure_aware"] else total
    if width < 1:
        raise WeftError(
            f"SAID spends {len(shapes)} of its d = {total} numbers on one scale for each layer, which leaves none to "
            f"project; give d={len(shapes) + 1} or more, or structure_aware=False."
        )
    return Common(theta=torch.zeros(width))


def dimension(shapes: Shapes, rank: int, options: Mapping[str, Any]) -> int:
    """d, all that is trained."""
    return rank * len(shapes) if options["d"] is None else int(options["d"])


def split(site: Site, *, d: int | None, structure_aware: bool) -> Split:
    """The layer's own map of the shared vector."""
    theta = site.shared.on(site)["theta"]
    out_features, in_features = site.shape
    seed = seed_of(site.generator)
    term = Projected(in_features, out_features, len(theta), seed, device=site.device, dtype=site.dtype)
    term.theta = theta
    nn.init.ones_(term.gain)
    return Split({"": term if structure_aware else no_gradient(term, "gain")})


def _no_own(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return 0  # the budget d covers the scales


def limit(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """The numbers of a layer."""
    return out_features * in_features


METHOD = Method(
    name="said",
    kind="adapt",
    summary="All layers moved by d numbers in total, through a fixed random projection each: the intrinsic dimension.",
    paper="Aghajanyan et al., 2020, arXiv 2012.13255",
    split=split,
    share=share,
    count=_no_own,
    count_shared=dimension,
    limit=limit,
    rules=(Replicated,),
    defaults={"d": None, "structure_aware": True},
)
