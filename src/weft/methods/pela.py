"""pela: every matrix of a trained model as a truncated SVD, trained further to the features of the dense one (Guo et
al., 2023, arXiv 2310.10700; its code guoyang9/PELA, `low_rank.py`, read).

    r = floor(out in / (c (out + in))),   B = U_r sqrt(s), A = sqrt(s) V_r
    loss + alpha mean_l |F_l - T_l|^2 / |T_l|^2 + beta mean (max |B A - W| - eps)^2

F_l is what block l puts out, T_l what it does in the dense model, on the same rows; that one is frozen, without
gradients. Every matrix gets the same share of numbers, one in c. What comes out is an ordinary small model: `weft
finetune` goes on with it. The dense model is held beside the trained one, and its forward pass comes on top of each
step.
Deviations: features count relative to the dense model's; published is the mean square of the error (relative=false),
of vision models, where no few channels are most of it as in a language model (of SmolLM2 at half of the numbers it is
thousands, beside a loss of a few nats). alpha 1, beta 1, eps 1e-3 are values of three differing scripts, for vision
models; its skip list is that of all pre-training here (embeddings, norms, head).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import WeftError
from weft.linalg.svd import low_rank_factors
from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.rules.feature_distillation import FeatureDistillation, Perturbation
from weft.terms import LowRank

__all__ = ["METHOD", "count", "rank_of", "split"]


def rank_of(out_features: int, in_features: int, ratio: float) -> int:
    """floor(out in / (c (out + in)))."""
    return int(out_features * in_features / (ratio * (out_features + in_features)))


def split(site: Site, *, ratio: float) -> Split:
    """The leading components, their size shared evenly."""
    out, inn = site.shape
    rank = rank_of(out, inn, ratio) if ratio > 0 else 0
    if not 1 <= rank <= min(out, inn):
        raise WeftError(
            f"A ratio of {ratio} gives {site.name} ({out} x {inn}) the rank {rank}; give a number "
            "above 1 such as 2, by which the numbers of a matrix are divided."
        )
    B, A = low_rank_factors(site.weight(), rank)
    return Split({"low_rank": LowRank.from_factors(B.to(site.dtype), A.to(site.dtype))})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """r (out + in)."""
    return lora_count(out_features, in_features, rank_of(out_features, in_features, options["ratio"]), options)


METHOD = Method(
    name="pela",
    kind="pretrain",
    summary="A truncated SVD of every matrix, trained to the features of the dense model.",
    paper="Guo et al., 2023, arXiv 2310.10700",
    split=split,
    count=count,
    ranked=False,
    rules=(FeatureDistillation, Perturbation),
    trained=low_rank_terms,
    begins=("given",),
    defaults={"ratio": 2.0, "alpha": 1.0, "relative": True, "beta": 1.0, "eps": 1e-3},
)
