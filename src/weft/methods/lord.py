"""lord: code models of one language, whose layers' outputs are of low rank on that language, cut to it in one pass
(Kaushal, Vaidhya and Rish, 2023, arXiv 2309.14021).

    y' = U_r U_r^T (W x + b) + (I - U_r U_r^T) m,   U_r, m of outputs on code of that language

The factors are `afm`'s. What the paper adds is where they serve: calibrated on the very language that is judged (weft's
own default is Python's sources), without training, ranks in multiples of `multiple` for the matrix units of GPUs (less
in small layers, so that there are eight ranks to choose from), layers without a saving left dense. The factors train as
they are, carry codes (`weft quantize`) and adapters. A rank 39 % lower is no size 39 % lower: two factors of r of the n
of a square matrix take 2 r / n of it. The budget here is in bytes.
Deviations: what the paper's ranks are by layer could not be found: each matrix keeps the same share. The components'
size is shared evenly between both factors, where the paper's left one is orthonormal: the same product. The number of
calibration samples could not be found either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.errors import WeftError
from weft.methods import afm
from weft.methods.base import Factors, Method, Moments, Shape, low_rank_sizes, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise", "sizes"]

_LEAST = 8  # ranks that a layer offers


def factorise(W: Tensor, moments: Moments, *, bias: bool = True, ridge: float = 1e-4, multiple: int = 8) -> Factors:
    """Factors of W in the metric of the inputs' covariance.

    Raises:
        WeftError: a multiple below 1.
    """
    if multiple < 1:
        raise WeftError(f"The multiple is {multiple}: ranks are multiples of a whole number from 1 on.")
    return afm.factorise(W, moments, bias=bias, ridge=ridge)


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rank, bytes) of multiples that save."""
    ranks = low_rank_sizes(shape, options)
    unit = max(min(options["multiple"], len(ranks) // _LEAST), 1)
    return [(rank, nbytes) for rank, nbytes in ranks if rank % unit == 0]


METHOD = Method(
    name="lord",
    kind="compress",
    summary="Principal components of outputs on code of one language, in ranks that matrix units like.",
    paper="Kaushal, Vaidhya and Rish, 2023, arXiv 2309.14021",
    needs=afm.METHOD.needs,
    split=low_rank_split(factorise),
    sizes=sizes,
    trained=low_rank_terms,
    defaults={"bias": True, "ridge": 1e-4, "multiple": 8},
)
