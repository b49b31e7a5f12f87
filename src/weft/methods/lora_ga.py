"""lora-ga: start the factors so that the first step follows the full gradient (Wang et al., 2024, arXiv 2407.05000,
section 3).

    G = dL/dW = U S V;   A0 = c V_{1..r},  B0 = c U_{r+1..2r},  c = out^(1/4) / sqrt(gamma)
    W + s (B A - B0 A0),  s = alpha / sqrt(r);   r (in + out) trainable numbers
    B0 B0^T G + G A0^T A0 = c^2 G_{2r}: the first step is the best rank-2r part of the full one

Follows the official code, with disjoint singular vectors for A and B and no singular values in them (PEFT's version
differs in both). The best learning rate is near that of full fine-tuning, an order of magnitude below LoRA's.
Deviations: an exact SVD for the official randomised one; the residual is kept as an exact sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import unknown
from weft.linalg.svd import truncated_svd
from weft.methods.adapter import SCALING, Pair, lora_count, low_rank
from weft.methods.base import Method, Site

__all__ = ["METHOD", "initialise"]

_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SIZES = ("stable", "unit", "gd", "weight")


def initialise(site: Site, scale: float, *, direction: str, size: str, gamma: float, clip: bool) -> Pair:
    """Disjoint sets of singular vectors of the mean gradient, scaled for a stable forward and backward pass.

    Args:
        direction: which of the leading 2r triplets go to A and B: "ArB2r" (the first r to A), "A2rBr" (the last r to
            A), "ArBr" (odd ones to A, even ones to B, counted from 0), or "random".
        size: the factors' length: "stable", "unit" (1), "gd" (1 / s), or "weight" (mean root of the leading singular
        values of W / s). clip: shrink the product where its largest entry exceeds the weight's.
    """
    r, G = site.rank, site.moments["mean_grad"].to(site.device)
    U, _, V = truncated_svd(G, 2 * r)
    for_A, for_B = _split(direction, r, site.generator)
    length = _length(size, site, scale, gamma)
    B, A = U[:, for_B] * length, V[for_A] * length
    if clip:
        share = (site.weight().abs().amax() / (scale * (B @ A).abs().amax())).clamp(max=1).sqrt()
        B, A = B * share, A * share
    return B, A


def _split(direction: str, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The indices of the triplets for A and for B."""
    if direction not in _DIRECTIONS:
        raise unknown("direction of lora-ga", direction, _DIRECTIONS)
    order = torch.arange(2 * r)
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "random":
        order = torch.randperm(2 * r, generator=generator)
    first, second = order[:r], order[r:]
    return (second, first) if direction == "A2rBr" else (first, second)


def _length(size: str, site: Site, scale: float, gamma: float) -> float:
    """The common length of A's rows and B's columns."""
    if size not in _SIZES:
        raise unknown("size of lora-ga", size, _SIZES)
    if size == "stable":
        return float(site.shape[0] ** 0.25 / gamma**0.5)
    if size == "weight":
        return float((truncated_svd(site.weight(), site.rank)[1] / scale).sqrt().mean())
    return 1 / scale if size == "gd" else 1.0


def _limit(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """A and B take disjoint triplets, so there must be twice as many."""
    return min(out_features, in_features) // 2


METHOD = Method(
    name="lora-ga",
    kind="adapt",
    summary="LoRA whose first step follows the full gradient: factors from the gradient's singular vectors.",
    paper="Wang et al., 2024, arXiv 2407.05000",
    needs=("mean_grad",),
    split=low_rank(initialise, shifted=True),
    count=lora_count,
    limit=_limit,
    defaults={
        **SCALING,
        "alpha": 16.0,
        "rslora": True,
        "direction": "ArB2r",
        "size": "stable",
        "gamma": 16.0,
        "clip": False,
    },
)
