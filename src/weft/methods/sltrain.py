"""sltrain: every matrix of a fresh model as low rank plus a random sparse one, both trained from scratch (Han et al.,
2024, arXiv 2406.02214; its code andyjm3/SLTrain, `splora_linear.py`, read: the same start, places and scale).

    W = (alpha / r) B A + S,   B (out, r) = 0,   A (r, in) ~ U(-1/sqrt(in), 1/sqrt(in))
    S has int(density out in) entries ~ U(-1/sqrt(in), 1/sqrt(in)), on places drawn once, uniformly, and never changed

The product takes the head of the spectrum, the scattered entries fill its tail, so that W has full rank. Numbers
trained: r (in + out) + int(density out in). Many tokens meet one product with W, built for the moment
(`weft.kernels.transient_linear`); few tokens one a term. alpha is 32, 16, 16, 8, 8 at ranks 128, 256, 256, 512, 1024
for LLaMA 60M to 7B; the density is 0.03, and 0.05 at 7B. The published rate is 3e-3 with AdamW, without decay.
Deviations: places are kept in 32 bits where they fit (the code: 64); no learned tanh scale; no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.errors import WeftError
from weft.methods.adapter import kaiming, lora_count, scale_of
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.terms import LowRank, Sparse

__all__ = ["METHOD", "count", "entries", "scattered", "split"]


def entries(name: str, out_features: int, in_features: int, density: float) -> int:
    """int(density out in), the entries of a sparse matrix.

    Raises WeftError where the density is none, or rows must be empty.
    """
    if not 0 < density <= 1:
        raise WeftError(f"density is {density}: give a share of the entries above 0, up to 1, such as 0.03.")
    found = int(density * out_features * in_features)
    if found < out_features:
        raise WeftError(
            f"A density of {density} gives {name} ({out_features} x {in_features}) {found} entries, fewer than it has "
            f"rows, so that some stay empty; give {1 / in_features:.4g} or more."
        )
    return found


def scattered(site: Site, density: float) -> Sparse:
    """A sparse matrix (out, in) on places drawn uniformly, its values ~ U(-1/sqrt(in), 1/sqrt(in))."""
    out, inn = site.shape
    nonzeros = entries(site.name, out, inn, density)
    term = Sparse(inn, out, nonzeros, device=site.device, dtype=site.dtype)
    places = torch.randperm(out * inn, generator=site.generator)[:nonzeros].sort().values
    with torch.no_grad():
        term.positions.copy_(places)
        term.values.copy_((torch.rand(nonzeros, generator=site.generator) * 2 - 1) / inn**0.5)
    return term


def split(site: Site, *, density: float, alpha: float) -> Split:
    """Factors whose product is zero, and the sparse matrix; nothing is read of the weight."""
    out, inn = site.shape
    A = kaiming(site.rank, inn, site.generator).to(site.device, site.dtype)
    B = torch.zeros(out, site.rank, device=site.device, dtype=site.dtype)
    term = LowRank.from_factors(B, A, scale=scale_of(site.rank, alpha=alpha))
    return Split({"low_rank": term, "sparse": scattered(site, density)})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """r (in + out) + int(density out in)."""
    return lora_count(out_features, in_features, rank, options) + int(options["density"] * out_features * in_features)


METHOD = Method(
    name="sltrain",
    kind="pretrain",
    summary="Low rank plus sparse entries on random places in place of every matrix, trained from scratch.",
    paper="Han et al., 2024, arXiv 2406.02214",
    split=split,
    count=count,
    trained=low_rank_terms,
    defaults={"density": 0.03, "alpha": 32.0},
)
