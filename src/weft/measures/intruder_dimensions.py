"""intruder-dimensions: leading singular vectors that resemble none of the matrix's own before training (Shuttleworth et
al., 2024, arXiv 2410.21228).

    c_j = max_i |<u_j(W), u_i(W0)>|, j = 1 ... k, over all left singular vectors u_i of W0 (out, in)
    intruders = how many c_j < epsilon

LoRA leaves such directions and full fine-tuning does not; they go with forgetting. Vectors of close singular values
rotate freely into each other, which is no intruder: `kept` is the share of the k vectors that lies in the span of the
first 2 k of W0. `floor`, about sqrt(2 ln n / n), is the c_j of a random direction among n: below some 32 rows epsilon
tells nothing.

Source: github.com/reeceshuttle/intruder-dimensions; k = 10 and epsilon = 0.5 are its settings.
Deviations: `kept` and `floor` are added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.linalg.svd import truncated_svd
from weft.measures.base import Measure

__all__ = ["MEASURE", "similarities", "value"]

_TRUSTED = 1e-6  # of the largest singular value: vectors of smaller ones are rounding


def value(W: Tensor, W0: Tensor, *, k: int = 10, epsilon: float = 0.5) -> dict[str, float]:
    """{"intruders", "kept", "floor"} of W (out, in) against W0 of the same shape."""
    found, kept = similarities(W, W0, k)
    n = W.shape[0]
    floor = math.sqrt(2 * math.log(n) / n) if n > 1 else 1.0
    return {"intruders": int((found < epsilon).sum()), "kept": kept, "floor": min(floor, 1.0)}


def similarities(W: Tensor, W0: Tensor, k: int = 10) -> tuple[Tensor, float]:
    """c_j (k,) and the share of the leading k left vectors of W in the span of the leading 2 k of W0."""
    U = truncated_svd(W.double(), min(k, *W.shape))[0]
    U0 = _left_vectors(W0.double())
    cosines = (U0.mT @ U).abs()
    return cosines.amax(0), float(cosines[: 2 * k].square().sum() / U.shape[1])


def _left_vectors(W: Tensor) -> Tensor:
    """The left singular vectors (out, m) by falling values, from the smaller Gram matrix."""
    if W.shape[0] <= W.shape[1]:
        return torch.linalg.eigh(W @ W.mT).eigenvectors.flip(1)
    values, V = torch.linalg.eigh(W.mT @ W)
    s = values.clamp(min=0).sqrt().flip(0)
    trusted = s > _TRUSTED * s[0]
    return (W @ V.flip(1))[:, trusted] / s[trusted]


MEASURE = Measure(
    name="intruder-dimensions",
    summary="Leading directions that the matrix had not before training.",
    paper="Shuttleworth et al., 2024, arXiv 2410.21228",
    value=value,
    reads={
        "intruders": "of the first k directions, those that are new; many: more is forgotten",
        "kept": "share of the first k directions within the first 2 k of before",
        "floor": "the likeness of a random direction",
    },
    of="pair",
    cost="a decomposition of each matrix of both models",
    defaults={"k": 10, "epsilon": 0.5},
)
