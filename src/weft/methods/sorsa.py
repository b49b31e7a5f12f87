"""sorsa: train the principal singular triplets as three factors, U and V pulled towards orthonormality (Cao, 2024,
arXiv 2409.00055, section 3).

    W = U S V;   W + U diag(s) V - (U_r diag(S_r) V_r at the start);   r (in + out + 1) trainable numbers
    pull: gamma / lr times the mean over all U and V of ||U^T U - I||_F and ||V V^T - I||_F, after clipping

`lr` is the peak learning rate (None: the optimizer's; 3e-5 as published): the official trainer divides gamma by it, so
that the pull follows the schedule.
Deviations: x passes through the three factors, where the official layer forms the product; the residual is kept as an
exact sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.linalg.svd import truncated_svd
from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split
from weft.rules.orthonormal import Orthonormal
from weft.terms import Shifted, Spectral

__all__ = ["METHOD", "split"]


def split(site: Site, **_: Any) -> Split:
    """The principal triplets, taken out of the base."""
    factors = (t.to(site.dtype) for t in truncated_svd(site.weight(), site.rank))
    return Split({"": Shifted.from_term(Spectral.from_factors(*factors))})


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return lora_count(out_features, in_features, rank, options) + rank


METHOD = Method(
    name="sorsa",
    kind="adapt",
    summary="The principal singular triplets trained as three factors, the singular vectors kept near orthonormal.",
    paper="Cao, 2024, arXiv 2409.00055",
    split=split,
    count=_count,
    rules=(Orthonormal,),
    defaults={"gamma": 4e-4, "lr": None},
)
