"""atoms: whether a matrix's columns could be told apart in sparse sums of them (Hu et al., 2025, arXiv 2509.20784).

    coherence = max over i < j of |d_i . d_j|, columns d of length 1
    unique_sparsity = the most columns k of which a sum is unique: k < (1 + 1 / coherence) / 2
    coherence_floor = sqrt((n - m) / (m (n - 1))), the least coherence of n directions in m dimensions (Welch)

The columns of an MLP's last matrix are what its neurons write. Theirs are far from unique: the worst pair decides, and
a large dictionary always has one; compare layers, and before and after compression.

Deviations: a matrix's own columns in the Euclidean metric, where the paper trains a sparse autoencoder and corrects the
metric by the states' covariance; only its abstract was at hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.measures.base import Measure

__all__ = ["MEASURE", "coherence", "value"]

_BLOCK = 2048


def value(W: Tensor) -> dict[str, float]:
    """{"coherence", "coherence_floor", "unique_sparsity"} of the columns of W (out, in); NaN below two."""
    m, n = W.shape
    mu = coherence(W)
    floor = math.sqrt((n - m) / (m * (n - 1))) if n > m else 0.0
    most = (1 + 1 / mu) / 2 if mu else math.inf
    return {"coherence": mu, "coherence_floor": floor, "unique_sparsity": min(math.ceil(most) - 1, m) if mu else m}


def coherence(W: Tensor) -> float:
    """The largest cosine of two different columns, without their sign; columns of zeros are left out."""
    norms = W.norm(dim=0)
    d = (W[:, norms > 0] / norms[norms > 0]).double()
    most = 0.0
    for start in range(0, d.shape[1], _BLOCK):
        cosines = (d[:, start : start + _BLOCK].mT @ d).abs()
        own = torch.arange(cosines.shape[0], device=cosines.device)
        cosines[own, own + start] = 0
        most = max(most, float(cosines.amax()))
    return min(most, 1.0)


MEASURE = Measure(
    name="atoms",
    summary="How nearly parallel the two most alike columns of a matrix are.",
    paper="Hu et al., 2025, arXiv 2509.20784",
    value=value,
    reads={
        "coherence": "1: two columns are one; low: sums of few columns are unique",
        "coherence_floor": "the least there can be of so many columns",
        "unique_sparsity": "so many columns can be told apart in any sum",
    },
    cost="the products of all pairs of columns, a block at a time",
)
