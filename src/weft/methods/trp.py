"""trp: dense matrices that are trained towards low rank, and end as factors (Trained Rank Pruning, Xu et al., 2018,
arXiv 1812.02402; its code yuhuixu1993/Trained-Rank-Pruning, `cifar-TRP.py`, read).

    every m steps   W <- U_k diag(s - tau)_+ V_k,   k the smallest rank that keeps the share T of sum s^2
    in the end      B = U_k sqrt(s), A = sqrt(s) V_k, by the same T; a matrix that would be no smaller stays dense

Truncating a trained matrix hurts since training never asked for low rank; here it asks, again and again. The memory of
training is that of dense weights. T acts on what the truncation before has left: after ten of them T^10 is kept. T is
0.99, as in the version of the code that was read, whose nuclear term is switched off. It counts weights and knows no
inputs: the first truncation may ruin a language model (it does SmolLM2), so judge it (--eval-text) and give a larger
`energy`.
Deviations: all matrices of a model's blocks in place of convolutions. tau is a share of the mean kept singular value,
taken with the truncation, where the paper adds lambda U_k V_k to the next gradient: with Adam that would leave the
singular basis, and 3e-4 at SGD's rate of 0.1 is nothing at Adam's. m is a tenth of the run, at most 200 (the
code: every step): an SVD of every matrix costs more than a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.linalg.spectrum import rank_for_energy
from weft.linalg.svd import low_rank_factors, singular_values
from weft.methods.base import Method, Site, Split
from weft.rules.truncate import Truncate
from weft.terms import Dense, LowRank

__all__ = ["METHOD", "count", "finish", "split"]


def split(site: Site) -> Split:
    """The matrix itself."""
    return Split({"dense": Dense.from_matrix(site.weight().to(site.dtype))})


def finish(site: Site, *, energy: float) -> Split:
    """Factors of the rank that keeps T, where they are smaller than the matrix."""
    W = site.weight()
    rank = max(1, rank_for_energy(singular_values(W), energy))
    if rank * sum(site.shape) >= W.numel():
        return split(site)
    B, A = low_rank_factors(W, rank)
    return Split({"low_rank": LowRank.from_factors(B.to(site.dtype), A.to(site.dtype))})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """out in."""
    return out_features * in_features


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [term.matrix for term in model.modules() if isinstance(term, Dense)]


METHOD = Method(
    name="trp",
    kind="pretrain",
    summary="Dense matrices truncated now and then while they are trained; factors in the end.",
    paper="Xu et al., 2018, arXiv 1812.02402",
    split=split,
    count=count,
    ranked=False,
    rules=(Truncate,),
    trained=_trained,
    begins=("given", "fresh"),
    finish=finish,
    exempt={"finishes": "the last truncation drops what the steps since the one before have added"},
    defaults={"energy": 0.99, "nuclear": 0.01, "every": None},
)
