"""power-law: the heavy-tail exponent of the spectrum of a whole matrix (Martin and Mahoney, 2021, arXiv 1810.01075).

    alpha_whole = exponent of the tail of the eigenvalues of W W^T, the tail's start by the Kolmogorov-Smirnov distance

Between 2 and 6 in trained networks. It depends on the shape of the matrix: compare layers of one shape only, or take
`farms`.

Deviations: at most 2000 starts of a tail are tried.
"""

from __future__ import annotations

from torch import Tensor

from weft.linalg.power_law import tail_exponent
from weft.linalg.svd import singular_values
from weft.measures.base import Measure

__all__ = ["MEASURE", "value"]

_ZERO = 1e-10


def value(W: Tensor) -> dict[str, float]:
    """{"alpha_whole"} of W (out, in)."""
    eigenvalues = singular_values(W).square()
    return {"alpha_whole": tail_exponent(eigenvalues[eigenvalues > _ZERO * eigenvalues.amax()], "any")}


MEASURE = Measure(
    name="power-law",
    summary="Heavy-tail exponent of the spectrum of the whole matrix.",
    paper="Martin and Mahoney, 2021, arXiv 1810.01075",
    value=value,
    reads={"alpha_whole": "2 to 6: trained; above 6: undertrained; of one shape only"},
    cost="the singular values of each matrix",
)
