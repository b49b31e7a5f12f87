"""kasa: drop the r smallest singular components of the weight, add an update with singular values of its own (Wang et
al., 2024, arXiv 2412.06071, sections 3.2 and 3.3).

    W = U S V;   W - U_min diag(S_min) V_min + s B diag(d) A,  s = alpha / r;   r (in + out + 1) trainable numbers
    A ~ U(-1/sqrt(in), 1/sqrt(in)),  B = 0,  d ~ N(0, 1)
    loss + beta sum d^2 + gamma (||B^T B - I||_F + ||A A^T - I||_F), summed over the layers

The r smallest of min(out, in) components are dropped; the reference drops none where in > out (it keeps in - r).
Deviations: what is dropped is a frozen term beside the base, r (in + out) stored numbers, so that the base keeps its
bytes, removal gives it back, and the whole is a LoRA of rank 2r; the orthogonality is that of the r x r side, as in
PEFT, where the reference builds in x in and out x out matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.linalg.svd import minor_svd
from weft.methods.adapter import kaiming, lora_count, scale_of
from weft.methods.base import Method, Site, Split
from weft.rules.spectral_penalty import SpectralPenalty
from weft.terms import Removed, Spectral

__all__ = ["METHOD", "split"]


def split(site: Site, *, alpha: float, dropout: float, beta: float, gamma: float) -> Split:
    """The update under "", what leaves the base under "minor"."""
    out_features, in_features = site.shape
    A = kaiming(site.rank, in_features, site.generator)
    d = torch.randn(site.rank, generator=site.generator)
    B, d, A = (factor.to(site.device, site.dtype) for factor in (torch.zeros(out_features, site.rank), d, A))
    update = Spectral.from_factors(B, d, A, scale=scale_of(site.nominal, alpha=alpha), dropout=dropout)
    U, s, V = (factor.to(site.dtype) for factor in minor_svd(site.weight(), site.rank))
    return Split({"": update, "minor": Removed.of(U * s, V)})


def limit(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """One component at least must stay in the base."""
    return min(out_features, in_features) - 1


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return lora_count(out_features, in_features, rank, options) + rank


def _penalty(*, beta: float, gamma: float) -> SpectralPenalty:
    return SpectralPenalty(size=beta, orthogonality=gamma)


METHOD = Method(
    name="kasa",
    kind="adapt",
    summary="The smallest singular components of the weight dropped, an update in SVD form learnt in their stead.",
    paper="Wang et al., 2024, arXiv 2412.06071",
    split=split,
    count=_count,
    limit=limit,
    deviates="The r smallest singular components of every weight are missing from the start.",
    rules=(_penalty,),
    defaults={"alpha": 16.0, "dropout": 0.0, "beta": 1e-4, "gamma": 1e-3},
)
