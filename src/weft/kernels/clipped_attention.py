"""Attention whose weights can be exactly zero, however near the logits are (clipped softmax, Bondarenko et al., 2023,
arXiv 2306.12929, equation 4).

    p = clip((zeta - gamma) softmax(s) + gamma, 0, 1),   s = q K^T scale + mask,   out = p V

gamma <= 0 and zeta >= 1. Weights whose softmax is at most -gamma / (zeta - gamma) are zero, and take no gradient; those
of masked keys are. Rows are not normalised again, so that a row of zeros is a head that adds nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clipped_attention", "clipped_softmax"]


def clipped_softmax(logits: Tensor, gamma: float, zeta: float) -> Tensor:
    """p (..., L, T) of logits (..., L, T), in fp32 at least; at gamma 0 and zeta 1 the plain softmax, bit by bit."""
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return p if gamma == 0 and zeta == 1 else ((zeta - gamma) * p + gamma).clamp(0, 1)


def clipped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, gamma: float, zeta: float, dropout: float = 0.0
) -> Tensor:
    """out (..., L, d) in the dtype of q.

    Args:
        q, k, v: (..., L, d), (..., T, d) and (..., T, d).
        mask: added to the logits (..., L, T), hugely negative where a key is hidden; None hides nothing.
        dropout: probability of dropping a key's weight.
    """
    logits = (q @ k.mT) * scale
    p = clipped_softmax(logits if mask is None else logits + mask.to(logits.dtype), gamma, zeta)
    out: Tensor = F.dropout(p.to(q.dtype), dropout, dropout > 0) @ v
    return out
