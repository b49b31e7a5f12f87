"""linear, cat, svd: three forms of the one sum of deltas, w_1 B_1 A_1 + ... + w_n B_n A_n.

    cat      [B_1 ... B_n] [A_1; ...; A_n]      exact; the factors themselves, ranks add up
    linear   the same matrix in the smallest rank that holds it (to fp32 rounding)
    svd      its best approximation of rank k in the Frobenius norm (Eckart and Young, 1936)

`cat` and `svd` are PEFT's `add_weighted_adapter` (2023), deltas as vectors those of task arithmetic (Ilharco et al.,
2022, arXiv 2212.04089). All through the QR decompositions of the thin factors, in fp64: no out x in matrix is formed.
Deviations: PEFT's "linear" adds the factors, (sum sqrt(w_j) B_j) (sum sqrt(w_j) A_j), whose cross terms B_i A_j belong
to no adapter, and which needs equal ranks; here "linear" is linear in the deltas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.linalg.svd import product_factors
from weft.merging.base import Merger, Pair

__all__ = ["CAT", "LINEAR", "SVD", "cat", "linear", "side_by_side", "svd"]


def side_by_side(pairs: Sequence[Pair]) -> Pair:
    """[B_1 ... B_n] (out, N) and [A_1; ...; A_n] (N, in), with N the sum of the ranks."""
    return torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs])


def cat(pairs: Sequence[Pair], rank: int, generator: torch.Generator) -> Pair:
    """The factors side by side; `rank` has no say."""
    return side_by_side(pairs)


def linear(pairs: Sequence[Pair], rank: int, generator: torch.Generator) -> Pair:
    """The sum without its zero components; `rank` has no say."""
    B, A = product_factors(*side_by_side(pairs))
    s = B.square().sum(0)  # B = U sqrt(s)
    kept = max(int((s > torch.finfo(torch.float32).eps * s[0]).sum()), 1)
    return B[:, :kept], A[:kept]


def svd(pairs: Sequence[Pair], rank: int, generator: torch.Generator) -> Pair:
    """The leading `rank` singular triplets of the sum, fewer where it has fewer."""
    B, A = product_factors(*side_by_side(pairs))
    kept = min(rank, *B.shape, A.shape[1])
    return B[:, :kept], A[:kept]


LINEAR = Merger(
    name="linear",
    summary="the weighted sum of deltas, exactly, in the smallest rank that holds it",
    paper="Ilharco et al., 2022, arXiv 2212.04089",
    merge=linear,
)
CAT = Merger(
    name="cat",
    summary="the same sum with the factors side by side; ranks add up",
    paper="Ilharco et al., 2022, arXiv 2212.04089",
    merge=cat,
)
SVD = Merger(
    name="svd",
    summary="the best approximation of the sum of a given rank",
    paper="Eckart and Young, 1936, doi:10.1007/BF02288367",
    merge=svd,
    ranked=True,
)
