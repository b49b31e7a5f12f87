"""ce-ssl: LoRA whose layers sit out a step at random, and whose ranks are halved where a score is low (Zhou et al.,
2024, arXiv 2406.14377).

    a step:             y = W x + s z B A x,  z = 0 with probability p, else 1, a coin a layer;  A ~ N(0, 0.02^2), B = 0
    eval, merge, save:  y = W x + (1 - p) s B A x
    ranks:              r where the score is among the highest, r / 2 in the `compress_ratio` lowest share of layers
    score:              mean over the entries of (W o G A^T A)^2 ("taylor"), or of (G A^T A)^2 ("fisher")
    trained:            r_l (in + out) a layer, and the biases of the adapted layers

G A^T A = (dL/dB) A is what a zero-started adapter sees of the weight's gradient G. A layer that sits out has no
gradient in that step, so that its momentum and decay rest too. The share that the paper tunes by data set is one number
here.
Deviations: G is the mean over all batches given, squared once, where the paper averages the squares of its batches; the
A of the score has a seed of its own. The third part, which feeds unlabelled data to batch-norm layers, has no
counterpart in models without them. Biases are trained where layers have them (`biases=False` leaves a plain LoRA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.methods.adapter import lora_count, scale_of
from weft.methods.base import Method, Moments, Site, Split
from weft.methods.soma import extras
from weft.rules.gate_draws import GateDraws
from weft.terms import GatedLowRank

__all__ = ["METHOD", "score", "split", "spread"]

DEVIATION = 0.02


def split(site: Site, *, alpha: float | None, p: float, **_: Any) -> Split:
    """A normal A, a zero B, and the gate that evaluation expects of the coins."""
    if not 0 <= p < 1:
        raise WeftError(f"p is {p}: the chance that a layer sits out a step lies from 0 up to 1, 1 excluded.")
    out_features, in_features = site.shape
    A = torch.randn(site.rank, in_features, generator=site.generator) * DEVIATION
    B, A = (factor.to(site.device, site.dtype) for factor in (torch.zeros(out_features, site.rank), A))
    gate = torch.full((site.rank,), 1 - p)
    return Split({"": GatedLowRank.from_factors(B, A, gate, scale=scale_of(site.nominal, alpha=alpha))})


def score(G: Tensor, A: Tensor, W: Tensor | None = None) -> float:
    """The mean of (W o G A^T A)^2, of (G A^T A)^2 without W; G, W (out, in), A (r, in)."""
    seen = (G @ A.mT) @ A
    return float((seen if W is None else W * seen).square().mean())


def spread(
    moments: Mapping[str, Moments], shapes: Mapping[str, tuple[int, int]], rank: int, options: Mapping[str, Any]
) -> dict[str, int]:
    """Half the rank for the `compress_ratio` share of layers with the lowest scores; of equals, the later ones."""
    if options["score"] not in ("taylor", "fisher"):
        raise WeftError(f"The score is {options['score']!r}; give 'taylor' or 'fisher'.")
    scores = {}
    for layer in shapes:
        G = moments[layer]["mean_grad"].float()
        A = torch.randn(rank, G.shape[1], generator=torch.Generator().manual_seed(0)) * DEVIATION
        W = moments[layer]["weight"] if options["score"] == "taylor" else None
        scores[layer] = score(G, A.to(G.device), W)
    kept = len(shapes) - math.floor(len(shapes) * options["compress_ratio"])
    important = sorted(shapes, key=lambda layer: -scores[layer])[:kept]
    return {layer: rank if layer in important else max(rank // 2, 1) for layer in shapes}


def _coins(*, p: float, rank: int, seed: int) -> GateDraws:
    """A coin for each layer."""

    def draw(generator: torch.Generator, nominal: int, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        plays = torch.rand(len(ranks), generator=generator) >= p
        return [(play.expand(rank), play.expand(rank)) for play, rank in zip(plays, ranks, strict=True)]

    return GateDraws(draw, rank=rank, seed=seed)


METHOD = Method(
    name="ce-ssl",
    kind="adapt",
    summary="LoRA whose layers sit out steps at random, with half the rank where the gradient's score is low.",
    paper="Zhou et al., 2024, arXiv 2406.14377",
    needs=("mean_grad",),
    split=split,
    count=lora_count,
    spread=spread,
    extras=extras,
    rules=(_coins,),
    defaults={"alpha": None, "p": 0.2, "compress_ratio": 0.6, "score": "taylor", "biases": True},
)
