"""superposition: how much the rows of a matrix overlap, as features that share fewer dimensions do (Liu et al., 2025,
arXiv 2505.10465).

    w_i = W_i / ||W_i||,   overlap = mean over pairs i < j of (w_i . w_j)^2,   from ||w^T w||_F^2
    overlap_random = overlap x m for rows of m numbers: 1 for random directions, 0 for orthogonal ones

More features than dimensions interfere by about 1/m a pair, so that the loss falls as 1/m with the width. A direction
that all rows have in common, as embeddings have, inflates both: `overlap_centred` is the second without it.

Source: github.com/liuyz0/SuperpositionScaling.
Deviations: mean squares, which scale as the paper says, where the code averages absolute values; rows of zeros, which
stand for unused tokens, are left out. Every matrix is measured; the paper's claim is of embeddings and heads.
"""

from __future__ import annotations

import math

from torch import Tensor

from weft.measures.base import Measure

__all__ = ["MEASURE", "overlap", "value"]


def value(W: Tensor) -> dict[str, float]:
    """{"overlap", "overlap_random", "overlap_centred"} of the rows of W (out, in); NaN below two rows."""
    W = W.double()
    found, width = overlap(W), W.shape[1]
    return {
        "overlap": found,
        "overlap_random": found * width,
        "overlap_centred": overlap(W - W.mean(0)) * width,
    }


def overlap(W: Tensor) -> float:
    """The mean squared cosine of two different rows, from the smaller Gram matrix."""
    norms = W.norm(dim=1)
    w = W[norms > 0] / norms[norms > 0, None]
    n = len(w)
    if n < 2:
        return math.nan
    gram = w @ w.mT if n <= w.shape[1] else w.mT @ w
    return max(float(gram.square().sum()) - n, 0.0) / (n * (n - 1))


MEASURE = Measure(
    name="superposition",
    summary="Overlap of a matrix's rows, as of features that share dimensions.",
    paper="Liu et al., 2025, arXiv 2505.10465",
    value=value,
    reads={
        "overlap": "mean squared cosine of two rows",
        "overlap_random": "1: rows as random directions, features in superposition; 0: orthogonal",
        "overlap_centred": "the same without the rows' mean",
    },
    cost="the smaller Gram matrix",
)
