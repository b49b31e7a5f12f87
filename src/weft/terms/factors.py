"""Exact low-rank factors: of a gated product, and of a sum of terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.terms.base import Factors, Term

__all__ = ["gated_factors", "sum_factors"]


def gated_factors(B: Tensor, gate: Tensor, A: Tensor) -> Factors:
    """B diag(gate) and A in fp32, detached, without the components whose gate is zero; one is left at least."""
    # components cannot be chosen of shards
    B, gate, A = (t.full_tensor() if isinstance(t, DTensor) else t for t in (B.detach(), gate, A.detach()))
    kept = gate.nonzero().flatten() if gate.any() else torch.arange(1, device=gate.device)
    return B.float()[:, kept] * gate[kept], A.float()[kept]


def sum_factors(terms: Sequence[Term]) -> Factors | None:
    """Factors of the sum: side by side, ranks add up. None when one of the terms has none."""
    pairs = [term.exact_factors() for term in terms]
    if not pairs or any(pair is None for pair in pairs):
        return None
    whole = [pair for pair in pairs if pair is not None]
    return torch.cat([B for B, _ in whole], dim=1), torch.cat([A for _, A in whole])
