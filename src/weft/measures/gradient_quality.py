"""gradient-quality: how hard a text pulls at each layer, and in how many directions (Li et al., 2025, arXiv
2504.10766).

    G = g^T x (out, in): gradient of a text's mean loss with respect to a weight; sigma: its singular values
    gradient_nuclear = sum sigma,   gradient_rank = exp H(sigma / sum sigma),   means over the texts

Better data pulls less hard, and in more directions; the second tells more. It cannot exceed the number of tokens that
carry a gradient, so that long texts score high by their length: `gradient_fullness` is the same as a share of what it
could be, and texts of one length compare. From the R of x^T and g^T where a text is shorter than a layer is wide, so
that no gradient of a weight is made.

Source: github.com/MingLiiii/Gradient_Unified.
Deviations: all linear layers, not the four of attention alone; windows of text and the loss on all of their tokens,
where the paper takes answers to prompts. Its cosines between layers, which it found to tell nothing, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.linalg.spectrum import effective_rank
from weft.linalg.svd import singular_values
from weft.measures.base import Figures, Measure

__all__ = ["MEASURE", "spectrum", "value"]


def value(x: Tensor, g: Tensor) -> dict[str, float]:
    """The figures of a text with inputs x (tokens, in) and output gradients g (tokens, out); NaN without gradient."""
    carrying = g.any(1)
    x, g = x[carrying].double(), g[carrying].double()
    most = min(*x.shape, g.shape[1])
    if not most:
        return dict.fromkeys(MEASURE.reads, math.nan)
    sigma = spectrum(x, g)
    rank = effective_rank(sigma)
    return {"gradient_nuclear": float(sigma.sum()), "gradient_rank": rank, "gradient_fullness": rank / most}


def spectrum(x: Tensor, g: Tensor) -> Tensor:
    """The singular values of g^T x, min(tokens, in, out) of them."""
    tokens = len(x)
    if tokens >= min(x.shape[1], g.shape[1]):
        return singular_values(g.mT @ x)
    left, right = (torch.linalg.qr(rows.mT, mode="r").R for rows in (g, x))  # (tokens, tokens) each
    return singular_values(left @ right.mT)


def mean(found: Mapping[str, Figures], model: nn.Module) -> dict[str, float]:
    """The means over the layers."""
    return {key: math.fsum(row[key] for row in found.values()) / len(found) for key in MEASURE.reads}


MEASURE = Measure(
    name="gradient-quality",
    summary="Size and effective rank of the gradients that texts give.",
    paper="Li et al., 2025, arXiv 2504.10766",
    value=value,
    of="gradient",
    reads={
        "gradient_nuclear": "how hard the texts pull at the layer; lower: better data; of one layer and model only",
        "gradient_rank": "in how many directions; higher: better data, at equal length",
        "gradient_fullness": "the same as a share of what the text's length and the layer allow",
    },
    whole=mean,
    reads_model={
        "gradient_nuclear": "mean over layers",
        "gradient_rank": "mean over layers: compare sets of data by it",
        "gradient_fullness": "mean over layers",
    },
    cost="a forward and a backward pass over the data and a decomposition a layer and text",
)
