"""effort: train the smallest singular components of the weight as three factors, the rest frozen (Yan et al., 2024,
arXiv 2411.15633, section 3.3).

    W = U S V;   W + U diag(s) V - U_min diag(S_min) V_min,  started on the r smallest triplets;
    r (in + out + 1) trainable numbers

`rank` is the number of trained components (the paper: 1, that is n - r with r = 1023 of 1024 kept; a user found 256
better). The paper's two losses (`weft.rules.kept_subspace`), weight 1 each, are commented out in the released code, and
some report that they hurt; they are options, `orthogonality` and `norm`, off by default. Where out and in differ, the
larger side has directions that belong to neither part. The paper adapts the attention of a vision encoder:
targets=["q_proj", "k_proj", "v_proj", "out_proj"].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.linalg.svd import minor_svd
from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split
from weft.rules.kept_subspace import KeptSubspace
from weft.terms import Shifted, Spectral

__all__ = ["METHOD", "split"]


def split(site: Site, *, orthogonality: float, norm: float) -> Split:
    """The minor triplets, taken out of the base."""
    U, s, V = (factor.to(site.dtype) for factor in minor_svd(site.weight(), site.rank))
    return Split({"": Shifted.from_term(Spectral.from_factors(U, s, V))})


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return lora_count(out_features, in_features, rank, options) + rank


METHOD = Method(
    name="effort",
    kind="adapt",
    summary="The smallest singular components of the weight trained as three factors, the rest of it frozen.",
    paper="Yan et al., 2024, arXiv 2411.15633",
    split=split,
    count=_count,
    rules=(KeptSubspace,),
    defaults={"orthogonality": 0.0, "norm": 0.0},
)
