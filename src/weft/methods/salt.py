"""salt: scale and shift the leading singular values of the weight, change the others by a low-rank product in their own
basis (Elsayed et al., 2025, arXiv 2503.16055, section 2).

    W = U diag(s) V,  k = min(out, in);   s_i' = a_i s_i + b_i for i < rho,  M = diag(s_rho ...) + X Y
    W' = U blockdiag(diag(s'), M) V;   2 rho + 2 (k - rho) r trainable numbers;   a = 1, b = 0, Y = 0, X ~ U(-c, c)
    with c = sqrt(6 / r)

`head` is rho: a count (an int), or a share of k (a float; the released code for SAM 2: 0.1, with r = 256). `relu=True`
is the published W' = U relu(...) V: it clips every negative entry of the block, off-diagonal ones too, so that about
half of X Y is dead, and a value that is shifted below zero does not come back. Off by default: the update is then a sum
of skinny products and exactly a LoRA of rank rho + r. The start is that of the released code for SAM 2 (its Kaiming
initialisation asks for the gain of a ReLU, for which a = sqrt(20) has no effect); the code for SAM 1 starts X and Y at
random numbers, away from the base. The penalty on size, whose published weight is 0, is left out. U and V are kept and
saved, up to twice the numbers of W: what was trained means nothing in another basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from weft.errors import WeftError
from weft.linalg.svd import truncated_svd
from weft.methods.adapter import no_gradient
from weft.methods.base import Method, Site, Split
from weft.terms import SingularBasis

__all__ = ["METHOD", "head_of", "split"]


def split(site: Site, *, head: float, relu: bool) -> Split:
    """The weight's own basis, nothing changed in it."""
    U, s, V = (factor.to(site.dtype) for factor in truncated_svd(site.weight()))
    tail = len(s) - head_of(len(s), head)
    X = (torch.rand(tail, site.rank, generator=site.generator) * 2 - 1) * math.sqrt(6 / site.rank)
    X, Y = (factor.to(site.device, site.dtype) for factor in (X, torch.zeros(site.rank, tail)))
    return Split({"": no_gradient(SingularBasis.from_factors(U, s, V, X, Y, relu=relu), "U", "s", "V")})


def head_of(size: int, head: float) -> int:
    """rho: a share (a float) of the `size` values, or a count (an int). Raises WeftError for more than there are."""
    count = int(head * size) if isinstance(head, float) else head
    if not 0 <= count <= size:
        raise WeftError(
            f"The option head is a share from 0.0 to 1.0, or a whole number of at most {size} values; {head} is not."
        )
    return count


def limit(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """The side of the block; 1 where all values are in the head and the block is empty."""
    size = min(out_features, in_features)
    return max(1, size - head_of(size, options["head"]))


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    size = min(out_features, in_features)
    head = head_of(size, options["head"])
    return 2 * head + 2 * (size - head) * rank


METHOD = Method(
    name="salt",
    kind="adapt",
    summary="Scale and shift of the leading singular values, a low-rank change of the others, in the weight's basis.",
    paper="Elsayed et al., 2025, arXiv 2503.16055",
    split=split,
    count=_count,
    limit=limit,
    defaults={"head": 0.1, "relu": False},
)
