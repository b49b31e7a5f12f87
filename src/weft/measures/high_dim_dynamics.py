"""high-dim-dynamics: in how many directions a layer can learn from a text, and how fast (Advani and Saxe, 2017, arXiv
1710.03667).

    lambda: eigenvalues of E[x x^T] (in, in)
    frozen_share = 1 - rank / in                 directions without inputs: no step moves a weight along them
    freedom = sum lambda / (lambda + ridge mean(lambda))             directions that are learned early
    slowest = least lambda of those that are not frozen / mean(lambda)

A gradient is a sum of outer products with inputs, so that it lies in their span. That explains why small adapters,
early stopping and a small start act alike; it predicts no loss: the theory is of linear networks and of label noise.

Deviations: the paper's curves of the test error, which belong to isotropic inputs, are left out; the spectrum of real
inputs stands in the place of its Marchenko-Pastur law.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weft.measures.base import Measure

__all__ = ["MEASURE", "value"]

_FROZEN = 1e-6  # of the largest eigenvalue: products in fp32 are no more exact


def value(moments: Mapping[str, Tensor], *, ridge: float = 0.01) -> dict[str, float]:
    """{"frozen_share", "freedom", "slowest"} of an input with this moment."""
    values = torch.linalg.eigvalsh(moments["input_moment"].double()).clamp(min=0)
    live = values[values > _FROZEN * values[-1]]
    mean = float(values.mean())
    return {
        "frozen_share": 1 - len(live) / len(values),
        "freedom": float((live / (live + ridge * mean)).sum()),
        "slowest": float(live[0]) / mean,
    }


MEASURE = Measure(
    name="high-dim-dynamics",
    summary="Directions in which a layer can learn from a text, and the slowest of them.",
    paper="Advani and Saxe, 2017, arXiv 1710.03667",
    value=value,
    of="input",
    needs=("input_moment",),
    reads={
        "frozen_share": "share of the input's directions that no step on such texts moves a weight along",
        "freedom": "directions that are learned early: a rank beyond it is of little use",
        "slowest": "how slowly the last of them is learned, 1: as fast as the mean",
    },
    cost="a forward pass over the data and the eigenvalues of each layer's input moment",
    defaults={"ridge": 0.01},
)
