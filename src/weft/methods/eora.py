"""eora: low-rank factors beside a compressed weight that take up what its outputs lost (Liu et al., 2024, arXiv
2410.21271).

    min over B A of rank r:  tr((dW - B A) C (dW - B A)^T),   dW = W - W_c (out, in),   C = E[x x^T] (in, in)
    U = leading r eigenvectors of dW C dW^T;   B = U,   A = U^T dW;   y = W_c x + B (A x)

with x the layer's inputs in the compressed model, all layers before it compensated already. No root or inverse of C is
taken, so that fewer tokens than channels are no special case and ||B A||_2 <= ||dW||_2. W_c is whatever the layer
computes now: codes, a pruned matrix, low-rank factors. `rank` 32 to 128 for every matrix as published; None spends what
a budget leaves.
Deviations: the inverse-free form (the official code divides by eigenvalues and replaces negative ones); a plain mean
for C (the official one discounts early batches); the components' size is shared evenly between B and A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, LowRankSplit, Method, Moments, Shape, Site, low_rank_sizes, low_rank_terms

__all__ = ["METHOD", "factorise", "sizes"]


def factorise(dW: Tensor, moments: Moments, *, rank: int | None = None) -> Factors:
    """Factors of what is missing, in the metric of the inputs' second moment."""
    return Factors(*principal_factors(dW, C=moments["input_moment"].to(dW.device), rank=rank))


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rank, bytes): every rank, or the one that is asked for.

    Raises:
        WeftError: the matrix has no such rank.
    """
    rank, unit = options["rank"], sum(shape) * shape.itemsize
    if rank is None:
        return low_rank_sizes(shape, options)
    if not 1 <= rank <= min(shape):
        raise WeftError(f"Rank {rank} is not possible on a {shape[0]} x {shape[1]} matrix; give 1 to {min(shape)}.")
    return [(rank, rank * unit)]


METHOD = Method(
    name="eora",
    kind="compensate",
    summary="Low-rank factors that repair the outputs of a compressed weight on chosen data.",
    paper="Liu et al., 2024, arXiv 2410.21271",
    needs=("input_moment",),
    allocate="equal",
    sequential=True,
    split=LowRankSplit(factorise, role="eora", of=Site.missing, dtype=torch.float32, partial=True),
    sizes=sizes,
    trained=low_rank_terms,
    defaults={"rank": None},
)
