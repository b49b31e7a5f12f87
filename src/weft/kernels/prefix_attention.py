"""Attention with an infinitely long prefix in two sums a head (NTK-Attention, 2024, arXiv 2406.14036).

    out = (E V + phi(q) Z) / (E 1 + phi(q) |z|),   E = exp(q K^T scale) over the unmasked keys
    phi(x) = ELU(x / d^(1/4)) + 1 > 0

Letters: q (..., L, d), K and V (..., T, d), Z (..., d, d), z (..., d). A prefix of keys p_i and values u_i whose weight
is the kernel phi(q) phi(p_i) instead of exp(q p_i scale) is exactly Z = sum phi(p_i) u_i^T, z = sum phi(p_i), whatever
its length; it only approximates the softmax attention on that prefix.
Both parts are divided by exp(c), c = max(largest unmasked logit of the row, 0): no logit overflows. (The official code
takes the maximum before masking and multiplies by exp(max), which overflows from 88 on.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["feature_map", "prefix_attention", "prefix_state"]


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = ELU(x / d^(1/4)) + 1, positive: (..., d) -> (..., d) in fp32."""
    return F.elu(x.float() / x.shape[-1] ** 0.25) + 1


def prefix_state(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Z (..., d, d) and z (..., d) of a prefix of m keys and values (..., m, d); of two prefixes they add up."""
    phi = feature_map(keys)
    return phi.mT @ values.float(), phi.sum(-2)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, Z: Tensor, z: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """out (..., L, d) in the dtype of q, computed in fp32.

    Args:
        mask: added to the logits (..., L, T), hugely negative where a key is hidden; None hides nothing.
        dropout: probability of dropping a key's weight.
    """
    logits = (q.float() @ k.float().mT) * scale
    if mask is not None:
        hidden = mask <= torch.finfo(mask.dtype).min / 2  # a dtype's smallest number stands for minus infinity
        logits = (logits + mask.float()).masked_fill(hidden, float("-inf"))
    peak = logits.amax(-1, keepdim=True).clamp(min=0).detach()
    weights = torch.exp(logits - peak)
    phi = feature_map(q) * torch.exp(-peak)
    total = weights.sum(-1, keepdim=True) + phi @ z.float().abs().unsqueeze(-1)
    out = F.dropout(weights, dropout, dropout > 0) @ v.float() + phi @ Z.float()
    return (out / total.clamp(min=torch.finfo(torch.float32).tiny)).to(q.dtype)
