"""hidden-covariance: how nearly uncorrelated the units that a layer reads are (Serianni and Kalita, 2023, arXiv
2306.00288).

    hidden_score = -1/n sum_i [ln(lambda_i + k) + 1 / (lambda_i + k)],   lambda: eigenvalues of the correlation matrix
    redundancy   = mean of the squared correlations of two different units

The score is about -1 where units are independent, and falls by about 1 / (k n) for every unit that another one repeats:
it is a detector of exact collinearity, and the redundancy says how much there is short of that.

Source: github.com/aaronserianni/training-free-nas; k = 1e-5 is its setting.
Deviations: the score is divided by the number n of units, so that layers compare; units that never change are left out,
where the code divides by zero; of a trained model, not of recurrent networks before training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weft.measures.base import Measure

__all__ = ["MEASURE", "correlations", "value"]

_CONSTANT = 1e-12  # of the second moment: variance below it is rounding


def value(moments: Mapping[str, Tensor], *, k: float = 1e-5) -> dict[str, float]:
    """{"hidden_score", "redundancy"} of an input with these moments; NaN below two units that change."""
    R = correlations(moments["input_moment"], moments["input_mean"])
    n = len(R)
    if n < 2:
        return {"hidden_score": float("nan"), "redundancy": float("nan")}
    values = torch.linalg.eigvalsh(R).clamp(min=0) + k
    squares = float(R.square().sum()) - n
    return {"hidden_score": -float((values.log() + 1 / values).mean()), "redundancy": squares / (n * (n - 1))}


def correlations(moment: Tensor, mean: Tensor) -> Tensor:
    """The correlation matrix (n, n) in fp64 of the units that change."""
    moment, mean = moment.double(), mean.double()
    covariance = moment - torch.outer(mean, mean)
    changing = covariance.diagonal() > _CONSTANT * moment.diagonal()
    covariance = covariance[changing][:, changing]
    scale = covariance.diagonal().rsqrt()
    return covariance * torch.outer(scale, scale)


MEASURE = Measure(
    name="hidden-covariance",
    summary="Correlation of the units that a layer reads.",
    paper="Serianni and Kalita, 2023, arXiv 2306.00288",
    value=value,
    of="input",
    needs=("input_moment", "input_mean"),
    reads={
        "hidden_score": "-1: independent units; far below: some repeat others, the layer shrinks",
        "redundancy": "mean squared correlation of two units; high: the layer shrinks",
    },
    cost="a forward pass over the data and the eigenvalues of each layer's correlation matrix",
    defaults={"k": 1e-5},
)
