"""dora: train the length of each row of the weight apart from its direction (Liu et al., 2024, arXiv 2402.09353,
equation 5).

    W' = diag(m / n) (W + s B A),   n_i = ||(W + s B A)_i||_2, held constant in the gradient
    m_i starts at ||W_i||, so that W' = W;   r (in + out) + out trainable numbers

Not a plain LoRA: scaling the rows of W is of full rank. Written in PEFT's own DoRA format.
Deviations: the scale is 1 unless `alpha` is given, published is alpha 2 r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.methods import lora
from weft.methods.adapter import lora_count, scale_of
from weft.methods.base import Method, Site, Split
from weft.terms import LowRank, Magnitude

__all__ = ["METHOD", "split"]


def split(site: Site, *, alpha: float | None, rslora: bool) -> Split:
    """LoRA's start under a vector of row lengths."""
    scale = scale_of(site.nominal, alpha=alpha, rslora=rslora)
    B, A = (factor.to(site.device, site.dtype) for factor in lora.initialise(site, scale))
    return Split({"": Magnitude.from_update(LowRank.from_factors(B, A, scale=scale), site.terms)})


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return lora_count(out_features, in_features, rank, options) + out_features


METHOD = Method(
    name="dora",
    kind="adapt",
    summary="LoRA on the direction of the weight's rows, a trained vector for their lengths.",
    paper="Liu et al., 2024, arXiv 2402.09353",
    split=split,
    count=_count,
    defaults={"alpha": None, "rslora": False},
)
