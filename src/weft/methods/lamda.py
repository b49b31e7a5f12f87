"""lamda: an r x r core between the weight's own singular sides, of which the output side is frozen column by column
early in the run (Azizi et al., 2024, arXiv 2406.12832).

    W = U S V;   A = V_r (frozen), R = diag(S_r) / s, B = U_r;   W + s (B R A - B0 R0 A)
    after step i of T the columns 0 ... floor(r i / (eta T)) - 1 of B are frozen; from eta T on R alone is trained
    r out + r^2 trainable numbers at the start, r^2 in the end

x is not kept for backward, for A is frozen: 2 r numbers a token are. T is the length of the run, or `steps`. `eta=0` is
LoRA-XS between these sides.
Deviations: the start is taken out of the base as an exact sum; the paper's text leaves open how the model starts at it.
The released schedule leaves out the factor r, freezes 3 columns in all, and starts from a random core: here the
paper's. LaMDA++, which chooses the ranks by the spectra, is left out: its score and candidates are not published in
enough detail; give `ranks=` from an allocation of `weft.allocate` instead. The scale is 1 unless `alpha` is given,
published are alpha 16 at r 64, and a dropout, which is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.linalg.svd import truncated_svd
from weft.methods.adapter import no_gradient, scale_of
from weft.methods.base import Method, Site, Split
from weft.rules.freeze_columns import FreezeColumns
from weft.terms import CoreLowRank, Shifted

__all__ = ["METHOD", "split"]


def split(site: Site, *, alpha: float | None, **_: Any) -> Split:
    """The principal triplets, taken out of the base."""
    scale = scale_of(site.nominal, alpha=alpha)
    U, s, V = truncated_svd(site.weight(), site.rank)
    factors = (factor.to(site.device, site.dtype) for factor in (U, torch.diag(s / scale), V))
    return Split({"": Shifted.from_term(no_gradient(CoreLowRank.from_factors(*factors, scale=scale), "A"))})


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return rank * out_features + rank * rank


METHOD = Method(
    name="lamda",
    kind="adapt",
    summary="A trained core between the weight's singular sides; the output side is frozen column by column.",
    paper="Azizi et al., 2024, arXiv 2406.12832",
    split=split,
    count=_count,
    rules=(FreezeColumns,),
    defaults={"alpha": None, "eta": 0.3, "steps": None},
)
