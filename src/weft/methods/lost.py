"""lost: every matrix of a fresh model as low rank plus dense columns, made complementary by an SVD of a random start
(Li et al., 2025, arXiv 2508.02668).

    W0 = U diag(s) V the drawn matrix;  B = U_r sqrt(s_r), A = sqrt(s_r) V_r;  I the columns of the longest remainders
    (W0 - B A)_j, int(density in) of them;  C = W0[:, I]
    y = gamma B act(A x) + (1 - gamma) C x[I]

B, A and C are trained, I never changes: a gather and a dense product, without a sparse kernel. r (in + out) + out
int(density in) numbers. With an activation the layer is no matrix, and can be neither merged nor exported as a dense
one; `activation` null is the linear form, `start` "remainder" takes C from the remainder, so that nothing is counted
twice.
Deviations: written from a description and public reviews, without the authors' code: that C starts from W0, an
activation of SiLU, gamma 0.9 (said of 130M) and density 0.05 are from there and from a re-implementation. In a random
matrix the columns differ little, and so does I from a random choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import WeftError, unknown
from weft.linalg.svd import low_rank_factors
from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.terms import ActivatedLowRank, Columns, LowRank

__all__ = ["METHOD", "columns", "count", "split"]


def columns(name: str, in_features: int, density: float) -> int:
    """int(density in). Raises WeftError where that is none, or more than there are."""
    found = int(density * in_features)
    if not 1 <= found <= in_features:
        raise WeftError(
            f"A density of {density} keeps {found} of the {in_features} columns of {name}; give "
            f"{1 / in_features:.4g} to 1."
        )
    return found


def split(site: Site, *, density: float, gamma: float, activation: str | None, start: str) -> Split:
    """The leading components of the drawn weight, and its columns that they miss most."""
    if not 0 < gamma < 1:
        raise WeftError(f"gamma is {gamma}: give the share of the low-rank part, above 0 and below 1.")
    W = site.weight()
    B, A = low_rank_factors(W, site.rank)
    rest = W - B @ A
    kept = rest.norm(dim=0).topk(columns(site.name, W.shape[1], density)).indices
    sources = {"weight": W, "remainder": rest}
    if start not in sources:
        raise unknown("start of the columns", start, sources)
    B, A, C = (t.to(site.device, site.dtype) for t in (B, A, sources[start][:, kept]))
    low = LowRank.from_factors(B, A, scale=gamma)
    if activation is not None:
        low = ActivatedLowRank.from_factors(B, A, activation, scale=gamma)  # type: ignore[assignment]
    return Split({"low_rank": low, "columns": Columns.from_columns(C, kept, W.shape[1], scale=1 - gamma)})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """r (in + out) + out int(density in)."""
    return lora_count(out_features, in_features, rank, options) + out_features * int(options["density"] * in_features)


METHOD = Method(
    name="lost",
    kind="pretrain",
    summary="Low rank plus the columns that it misses most of a random start, in place of every matrix.",
    paper="Li et al., 2025, arXiv 2508.02668",
    split=split,
    count=count,
    trained=low_rank_terms,
    defaults={"density": 0.05, "gamma": 0.9, "activation": "silu", "start": "weight"},
)
