"""olora: start the factors on the first r columns and rows of the weight's QR, and freeze the rest.

    W = Q R;   B0 = Q_r (orthonormal), A0 = R_r;   W + s (B A - B0 A0);   r (in + out) trainable numbers

Büyükakyüz, 2024, arXiv 2406.01775, algorithm 1. No statistics. The residual is kept as an exact sum.
"""

from __future__ import annotations

import torch

from weft.methods.adapter import SCALING, Pair, lora_count, low_rank
from weft.methods.base import Method, Site

__all__ = ["METHOD", "initialise"]


def initialise(site: Site, scale: float) -> Pair:
    """The leading part of a reduced QR, in fp32."""
    Q, R = torch.linalg.qr(site.weight())
    return Q[:, : site.rank], R[: site.rank]


METHOD = Method(
    name="olora",
    kind="adapt",
    summary="LoRA started on the leading columns of the weight's QR decomposition, which leave the frozen base.",
    paper="Büyükakyüz, 2024, arXiv 2406.01775",
    split=low_rank(initialise, shifted=True),
    count=lora_count,
    defaults=SCALING,
)
