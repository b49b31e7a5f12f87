"""matrix-nuclear-norm: how spread out a model's last hidden states of a text are (Li et al., 2024, arXiv 2410.10672).

    X (N, d): hidden states less their mean over the tokens, each row of length 1
    matrix_nuclear_norm = 1/N sum of the min(N, d) largest column norms of X
    nuclear_norm_exact  = 1/N sum of the singular values of X, which the first stands for in O(N d)
    matrix_entropy      = -sum_i p_i ln p_i / ln d,   p: eigenvalues of X^T X / trace

The exact two stand beside it: the first depends on the basis, so that a few outlying dimensions, or a rotation of the
model that changes nothing it computes, move it. All fall with N: compare texts of one length.

Source: github.com/MLGroupJLU/MatrixNuclearNorm.
Deviations: in fp64; a token that is the mean itself counts as zero, where the code gives NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.measures.base import Measure

__all__ = ["MEASURE", "spread", "value"]


def value(H: Tensor) -> dict[str, float]:
    """The three figures of H (N, d), the last hidden states of one text."""
    X = spread(H)
    N, d = X.shape
    if not bool(X.any()):
        return dict.fromkeys(MEASURE.reads_model, math.nan)
    columns = X.norm(dim=0).sort(descending=True).values[: min(N, d)]
    squares = torch.linalg.eigvalsh(X @ X.mT if d > N else X.mT @ X).clamp(min=0)
    entropy = float(torch.special.entr(squares / squares.sum()).sum()) / math.log(d) if d > 1 else 0.0
    return {
        "matrix_nuclear_norm": float(columns.sum()) / N,
        "nuclear_norm_exact": float(squares.sqrt().sum()) / N,
        "matrix_entropy": entropy,
    }


def spread(H: Tensor) -> Tensor:
    """X (N, d) in fp64: less the mean over tokens, rows of length 1; a row of zeros stays one."""
    X = H.double() - H.double().mean(0)
    norms = X.norm(dim=1, keepdim=True)
    return torch.where(norms > 1e-12 * H.double().norm(dim=1, keepdim=True), X / norms, torch.zeros_like(X))


MEASURE = Measure(
    name="matrix-nuclear-norm",
    summary="Spread of the last hidden states of a text.",
    paper="Li et al., 2024, arXiv 2410.10672",
    value=value,
    of="hidden",
    reads_model={
        "matrix_nuclear_norm": "high: hidden states spread over many directions; depends on the basis",
        "nuclear_norm_exact": "what it stands for, free of the basis",
        "matrix_entropy": "0: one direction, 1: all alike",
    },
    cost="a forward pass over the data; the exact figures take the eigenvalues of a tokens x tokens matrix a text",
)
