"""sst: every matrix as its whole SVD, all singular values trained and a few of the vectors at a time (Sparse Spectral
Training, Zhao et al., 2024, arXiv 2405.15481).

    W0 = U diag(s) V;   every T3 steps draw r of the m vectors, p_j = (1 / m + s_j / sum s) / 2
    ds_j = u_j^T G v_j for all j,   du_j = G v_j, dv_j = G^T u_j for those drawn,   which then get length 1

The weight keeps its full rank, and gradients and moments are those of low rank: r (in + out) + m numbers are trained.
Held are about twice a dense matrix's numbers of a square matrix, U and V beside what is trained; it pays where moments
are what fills the memory. In the end the product becomes a plain matrix.
Deviations: written from a description, without the authors' code. The hyperbolic form is left out. T3, 200 from memory,
is cut so that a run's m / r draws fit in it, after which the SVD comes: a run of one such round has none; no warm-up
after a draw. A vector whose singular value is 0 waits, without a gradient, until the value has risen. In bfloat16
larger singular values are too coarse for steps of 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.linalg.svd import truncated_svd
from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.rules.sampled_vectors import SampledVectors, drawn
from weft.terms import Dense, SampledSpectral

__all__ = ["METHOD", "count", "finish", "split"]


def split(site: Site) -> Split:
    """The weight's SVD, the first vectors drawn."""
    U, s, V = truncated_svd(site.weight())
    active = torch.arange(site.rank) if s.is_meta else drawn(s, site.rank, site.generator)
    U, s, V = (t.to(site.dtype) for t in (U, s, V))
    return Split({"spectral": SampledSpectral.from_svd(U, s, V, active)})


def finish(site: Site) -> Split:
    """The matrix."""
    return Split({"dense": Dense.from_matrix(site.weight().to(site.dtype))})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """r (in + out) + min(in, out)."""
    return lora_count(out_features, in_features, rank, options) + min(out_features, in_features)


METHOD = Method(
    name="sst",
    kind="pretrain",
    summary="The whole SVD, all singular values trained and a few of the vectors at a time.",
    paper="Zhao et al., 2024, arXiv 2405.15481",
    split=split,
    count=count,
    rules=(SampledVectors,),
    trained=low_rank_terms,
    begins=("fresh", "given"),
    finish=finish,
    defaults={"every": None},
)
