"""eva: A spans the directions in which the layer's inputs vary most, B = 0; ranks go where they explain most
(Paischer et al., 2024, arXiv 2410.07170, section 3).

    Sigma = E[x x^T] - m m^T = Q diag(l) Q^T;   A = Q_r^T,  B = 0;   y = W x + s B A x;   r (in + out) trainable numbers

Ranks: the N r largest explained-variance ratios l_i / sum l, over the first round(rho r) components of all N layers;
a layer may get none. The scale is that of the nominal rank on every layer (alpha / rank is constant).
Deviations: the exact eigenvectors of the inputs' covariance, where the paper updates an incremental PCA until it
converges; `whiten` divides by the root of the standard deviation of one token, PEFT by that of the sum over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.linalg.krylov import leading_eigh
from weft.methods.adapter import SCALING, Pair, lora_count, low_rank
from weft.methods.base import Method, Moments, Site

__all__ = ["METHOD", "initialise", "spread"]


def initialise(site: Site, scale: float, *, centred: bool, whiten: bool, rho: float) -> Pair:
    """The leading principal directions of the inputs; `centred` subtracts their mean, as the official code does."""
    variances, Q = leading_eigh(covariance(site.moments, centred), site.rank)
    A = Q.mT
    if whiten:
        deviation = variances.clamp(min=0).sqrt()
        A = A / deviation.clamp(min=deviation[0] * torch.finfo(A.dtype).eps).sqrt().unsqueeze(1)
    return torch.zeros(site.shape[0], site.rank), A


def spread(
    moments: Mapping[str, Moments], shapes: Mapping[str, tuple[int, int]], rank: int, options: Mapping[str, Any]
) -> dict[str, int]:
    """Rank by layer, `rank` in the mean, from 0 to round(rho * rank)."""
    most = {name: min(round(rank * options["rho"]), *shapes[name]) for name in shapes}
    claims: list[tuple[float, str]] = []
    last, ratios = None, list[float]()
    for name in shapes:
        moment, count = moments[name]["input_moment"], most[name]
        if moment is not last or count > len(ratios):  # q, k and v, fed one tensor, share its moment
            last, ratios = moment, _ratios(moments[name], options["centred"], count).tolist()
        claims += [(-ratio, name) for ratio in ratios[:count]]
    ranks = dict.fromkeys(shapes, 0)
    # the sort is stable: among equal ratios the earlier layer comes first
    for _, name in sorted(claims, key=lambda claim: claim[0])[: rank * len(shapes)]:
        ranks[name] += 1
    return ranks


def covariance(moments: Moments, centred: bool = True) -> Tensor:
    """The inputs' covariance, or their second moment: (in, in) in fp64."""
    C = moments["input_moment"].double()
    m = moments["input_mean"].double()
    return C - torch.outer(m, m) if centred else C


def _ratios(moments: Moments, centred: bool, count: int) -> Tensor:
    """The largest shares of the variance, falling: (count,)."""
    C = covariance(moments, centred)
    variances = leading_eigh(C, count)[0].clamp(min=0)
    return variances / C.diagonal().sum().clamp(min=torch.finfo(variances.dtype).tiny)


METHOD = Method(
    name="eva",
    kind="adapt",
    summary="LoRA whose A spans the directions that explain the inputs' variance; ranks follow the variance explained.",
    paper="Paischer et al., 2024, arXiv 2410.07170",
    needs=("input_moment", "input_mean"),
    split=low_rank(initialise),
    count=lora_count,
    spread=spread,
    defaults={**SCALING, "rho": 2.0, "centred": True, "whiten": False},
)
