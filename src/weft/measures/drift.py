"""drift: how far a matrix has moved, and in how many directions.

    drift = ||W - W0||_F / ||W0||_F,   drift_rank = ||W - W0||_F^2 / ||W - W0||_2^2

Deviations: none; the second is the stable rank of the change.
"""

from __future__ import annotations

from torch import Tensor

from weft.linalg.spectrum import stable_rank
from weft.linalg.svd import singular_values
from weft.measures.base import Measure

__all__ = ["MEASURE", "value"]


def value(W: Tensor, W0: Tensor) -> dict[str, float]:
    """{"drift", "drift_rank"} of W (out, in) against W0."""
    s = singular_values(W.double() - W0.double())
    size = float(W0.double().norm())
    moved = float(s.norm())
    return {"drift": moved / size if size else float(moved > 0), "drift_rank": stable_rank(s)}


MEASURE = Measure(
    name="drift",
    summary="Size of the change of a matrix, and the directions that it uses.",
    paper="weft",
    value=value,
    reads={
        "drift": "size of the change, a share of the matrix",
        "drift_rank": "directions of the change that matter",
    },
    of="pair",
    cost="the singular values of each change",
)
