"""Exact low-rank factors of a term, for every structure that has them: what makes an adapter a plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.terms.base import Term
from weft.terms.core_low_rank import CoreLowRank
from weft.terms.low_rank import LowRank
from weft.terms.shard_sum import ShardSum
from weft.terms.shifted import Shifted
from weft.terms.singular_basis import SingularBasis
from weft.terms.spectral import Spectral

__all__ = ["exact_factors", "gated_factors", "sum_factors"]

Factors = tuple[Tensor, Tensor]


@singledispatch
def exact_factors(term: Term) -> Factors | None:
    """B (out, r), A (r, in) in fp32 with B A = T, detached; None when T has no exact factors of low rank.

    A new structure that has them registers itself: `@exact_factors.register` beside its class, or here.
    """
    return None


@exact_factors.register
def _(term: LowRank) -> Factors | None:
    return term.B.detach().float() * term.scale, term.A.detach().float()


@exact_factors.register
def _(term: Spectral) -> Factors | None:
    return gated_factors(term.U, term.s.detach().float() * term.scale, term.V)


@exact_factors.register
def _(term: CoreLowRank) -> Factors | None:
    return term.B.detach().float() @ term.R.detach().float() * term.scale, term.A.detach().float()


@exact_factors.register
def _(term: SingularBasis) -> Factors | None:
    if term.relu:
        return None
    U, gain, V, X, Y = (t.detach().float() for t in (term.U, term.gain(), term.V, term.X, term.Y))
    head = term.head
    return torch.cat([U[:, :head] * gain, U[:, head:] @ X], dim=1), torch.cat([V[:head], Y @ V[head:]])


@exact_factors.register
def _(term: ShardSum) -> Factors | None:
    B, A = term.factors(torch.float32)
    return B.detach(), A


@exact_factors.register
def _(term: Shifted) -> Factors | None:
    now, start = exact_factors(term.now), exact_factors(term.start)
    if now is None or start is None:
        return None
    return torch.cat([now[0], -start[0]], dim=1), torch.cat([now[1], start[1]])


def gated_factors(B: Tensor, gate: Tensor, A: Tensor) -> Factors:
    """B diag(gate) and A in fp32, detached, without the components whose gate is zero; one is left at least."""
    # components cannot be chosen of shards
    B, gate, A = (t.full_tensor() if isinstance(t, DTensor) else t for t in (B.detach(), gate, A.detach()))
    kept = gate.nonzero().flatten() if gate.any() else torch.arange(1, device=gate.device)
    return B.float()[:, kept] * gate[kept], A.float()[kept]


def sum_factors(terms: Sequence[Term]) -> Factors | None:
    """Factors of the sum: side by side, ranks add up. None when one of the terms has none."""
    pairs = [exact_factors(term) for term in terms]
    if not pairs or any(pair is None for pair in pairs):
        return None
    whole = [pair for pair in pairs if pair is not None]
    return torch.cat([B for B, _ in whole], dim=1), torch.cat([A for _, A in whole])
