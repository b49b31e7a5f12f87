"""w-pca: how many principal components the activations of a layer need (Wang, 2025, arXiv 2504.15983).

    components = least k with lambda_1 + ... + lambda_k >= eta sum lambda,   lambda: eigenvalues of Cov(x) (in, in)
    w_pca = parameters x sum of components over the readers of the MLPs

The paper scores untrained networks by it, to search among them; of a trained model, few components of the inputs mean
that a low rank serves the layer on such data. The product mostly ranks by size: the number of parameters stands beside
it.

Source: github.com/ra225/W-PCA.
Deviations: every linear layer's inputs are counted, and those that read the MLP's neurons are summed; the covariance is
the streamed one of all texts, not of one minibatch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.linalg.spectrum import rank_for_energy
from weft.measures.base import Figures, Measure
from weft.terms.joints import joints

__all__ = ["MEASURE", "covariance_spectrum", "score", "value"]


def value(moments: Mapping[str, Tensor], *, eta: float = 0.99) -> dict[str, float]:
    """{"components", "components_share"} of an input with these moments."""
    values = covariance_spectrum(moments["input_moment"], moments["input_mean"])
    k = rank_for_energy(values.sqrt(), eta)
    return {"components": k, "components_share": k / len(values)}


def covariance_spectrum(moment: Tensor, mean: Tensor) -> Tensor:
    """Eigenvalues of E[x x^T] - E[x] E[x]^T (in, in), falling, none below zero, in fp64."""
    moment, mean = moment.double(), mean.double()
    values: Tensor = torch.linalg.eigvalsh(moment - torch.outer(mean, mean)).flip(0)
    return values.clamp(min=0)


def score(found: Mapping[str, Figures], model: nn.Module) -> dict[str, float]:
    """{"pca", "w_pca"}: the components of the MLPs' readers, and times the parameters."""
    readers = {list(j.members.values())[-1].layer for j in joints(model, found) if j.kind == "mlp"}
    total = sum(found[name]["components"] for name in readers)
    return {"pca": total, "w_pca": total * sum(p.numel() for p in model.parameters())}


MEASURE = Measure(
    name="w-pca",
    summary="Principal components that a layer's inputs need.",
    paper="Wang, 2025, arXiv 2504.15983",
    value=value,
    of="input",
    needs=("input_moment", "input_mean"),
    reads={
        "components": "directions of the inputs that hold 99 % of their variance; few: a low rank serves",
        "components_share": "the same as a share of the input's width",
    },
    whole=score,
    reads_model={
        "pca": "components of the MLPs' neurons, summed",
        "w_pca": "the same times the parameters: a search takes the largest; mostly size",
    },
    cost="a forward pass over the data and the eigenvalues of each layer's input moment",
    defaults={"eta": 0.99},
)
