"""lora-xs: train only an r x r core between the frozen principal singular vectors of the weight (Bałazy et al., 2024,
arXiv 2405.17604, section 3).

    W = U S V;   B = U_r diag(S_r), A = V_r frozen, R ~ N(0, 1e-5^2);   y = W x + B R A x;   r^2 trainable numbers (R)

Exact SVD. Because S_r sits on one side, the size of a step depends on the weight's scale, unlike lora-sb.
"""

from __future__ import annotations

import torch

from weft.linalg.svd import truncated_svd
from weft.methods.base import Method, Site, Split
from weft.methods.lora_sb import core_count, frozen_sides

__all__ = ["METHOD", "split"]


def split(site: Site, *, deviation: float) -> Split:
    """The weight's own principal sides around a core of nearly zero."""
    U, s, V = truncated_svd(site.weight(), site.rank)
    R = torch.randn(site.rank, site.rank, generator=site.generator) * deviation
    return Split({"": frozen_sides(site, U * s, R, V)})


METHOD = Method(
    name="lora-xs",
    kind="adapt",
    summary="An r x r core between the frozen principal singular vectors of the weight.",
    paper="Bałazy et al., 2024, arXiv 2405.17604",
    split=split,
    count=core_count,
    deviates="Its core starts at random numbers of standard deviation 1e-5.",
    defaults={"deviation": 1e-5},
)
