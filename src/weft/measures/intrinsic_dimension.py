"""intrinsic-dimension: of how many dimensions the cloud of a text's token vectors is (Pedashenko et al., 2025, arXiv
2511.15210, who measure texts so; the two estimators are older).

    r_j(i): distance of token i to its j-th nearest neighbour, of the N tokens' last hidden states (N, d)
    dimension_two_nn = (N - 1) / sum_i ln(r_2 / r_1)                                        (Facco et al., 2017)
    dimension_mle    = 1 / mean over i and j < k of ln(r_k / r_j)                           (Levina and Bickel, 2004)

Two estimates of one thing agree in order, not in value; both are low for high dimensions, and rise with the number of
tokens: compare texts of one length. Below some hundred tokens they are noise.

Deviations: no persistent-homology estimate, which the paper prefers; the largest tenth of the ratios, which some codes
leave out of TwoNN, counts (scikit-dimension: `discard_fraction`); the k of Levina and Bickel is averaged as their
inverse (MacKay and Ghahramani, 2005). Tokens that coincide with another count once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.measures.base import Measure

__all__ = ["MEASURE", "neighbours", "value"]

_LEAST = 4  # distinct tokens


def value(H: Tensor, *, k: int = 20) -> dict[str, float]:
    """{"dimension_two_nn", "dimension_mle"} of H (N, d); NaN below four different tokens."""
    H = torch.unique(H.double(), dim=0)
    if len(H) < _LEAST:
        return dict.fromkeys(MEASURE.reads_model, math.nan)
    r = neighbours(H, min(k, len(H) - 1)).log()
    two = (len(H) - 1) / float((r[:, 1] - r[:, 0]).sum())
    mean = float((r[:, -1:] - r[:, :-1]).mean())
    return {"dimension_two_nn": two, "dimension_mle": 1 / mean if mean else math.nan}


def neighbours(H: Tensor, k: int) -> Tensor:
    """Distances (N, k) to the k nearest others, rising."""
    distances = torch.cdist(H, H, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(math.inf)
    return distances.topk(k, largest=False).values


MEASURE = Measure(
    name="intrinsic-dimension",
    summary="Dimension of the cloud of a text's hidden states, by two estimators.",
    paper="Pedashenko et al., 2025, arXiv 2511.15210",
    value=value,
    of="hidden",
    reads_model={
        "dimension_two_nn": "dimension by two neighbours; about 8 for scientific prose, above 10 for stories (paper)",
        "dimension_mle": "the same by k neighbours; agrees in order, not in value",
    },
    cost="a forward pass over the data and all distances between a text's tokens",
    defaults={"k": 20},
)
