"""lorc: low-rank factors beside a compressed weight, the leading part of its error (Yao et al., 2023, ZeroQuant-V2,
arXiv 2303.08302; with floating-point codes: ZeroQuant-FP, arXiv 2307.09782).

    B A = the rank-r truncated SVD of W - W_c;   y = W_c x + B (A x)

No data is needed. The error of a good code is nearly white, so that few components hold little of it; `eora` is the
same in the metric of the inputs. `rank` 8 to 16 as published; None spends what a budget leaves.
Deviations: the factors stay in the layer's dtype, where the paper also stores them in 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, LowRankSplit, Method, Moments, Site, low_rank_terms
from weft.methods.eora import sizes

__all__ = ["METHOD", "factorise"]


def factorise(dW: Tensor, moments: Moments, *, rank: int | None = None) -> Factors:
    """Factors of what is missing."""
    return Factors(*principal_factors(dW, rank=rank))


METHOD = Method(
    name="lorc",
    kind="compensate",
    summary="Low-rank factors of what a compressed weight lost, without data.",
    paper="Yao et al., 2023, arXiv 2303.08302 and 2307.09782",
    allocate="equal",
    split=LowRankSplit(factorise, role="lorc", of=Site.missing, dtype=torch.float32, partial=True),
    sizes=sizes,
    trained=low_rank_terms,
    defaults={"rank": None},
)
