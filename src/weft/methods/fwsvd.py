"""fwsvd: SVD weighted by the Fisher information of the task loss (Hsu et al., 2022, arXiv 2207.00112).

An element-wise weighted SVD has no closed form; summing the Fisher information over one side of W leaves a diagonal
metric, which has one:

    axis = "input":   minimise sum_ij f_j (W - W')_ij^2,   f_j = sum_i F_ij,   F_ij = E_d[(dL_d / dW_ij)^2]
    axis = "output":  the same with f_i = sum_j F_ij on the rows.

Deviations: the paper's rows are taken for torch's inputs, as its re-implementations do (`axis` chooses); the Fisher
information is a mean over samples of squared *per-sample* gradients, where those re-implementations square the batch
gradient.
"""

from __future__ import annotations

from torch import Tensor

from weft.errors import WeftError
from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, Method, Moments, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise"]


def factorise(W: Tensor, moments: Moments, *, axis: str = "input", floor: float = 1e-6) -> Factors:
    """The weighted factors; `floor` is added to f relative to its mean: a weight the task never moves stays finite."""
    if axis not in ("input", "output"):
        raise WeftError(f"fwsvd's axis is 'input' or 'output', not {axis!r}.")
    if axis == "input":
        return Factors(*principal_factors(W, C=moments["fisher_columns"], ridge=floor))
    return Factors(*principal_factors(W, M=moments["fisher_rows"], ridge=floor))


METHOD = Method(
    name="fwsvd",
    kind="compress",
    summary="SVD weighted by the Fisher information of each input (or output) channel.",
    paper="Hsu et al., 2022, arXiv 2207.00112",
    needs=("fisher_columns", "fisher_rows"),
    split=low_rank_split(factorise),
    trained=low_rank_terms,
    defaults={"axis": "input", "floor": 1e-6},
)
