"""soka: train the principal Kronecker products of the weight, the rest of it frozen (Chong and Qu, 2025, arXiv
2506.15251).

    W = sum_k s_k U_k (x) V_k  (Van Loan and Pitsianis);   W + sum over k <= K of (A_k (x) B_k - their start)
    A_k = sqrt(s_k) U_k (m1, n1),  B_k = sqrt(s_k) V_k (m2, n2);   K (m1 n1 + m2 n2) trainable numbers

K is the smallest number of products that hold `energy` of the squared weight, at most `rank`, and with `elbow` at most
the elbow of the spectrum: the point farthest below the chord of its logarithm. The threshold and the rule of the elbow
are ours, as no code was released; spectra of trained weights decay slowly, so `rank`, the cap, often decides. Blocks
are as square as the layer's divisors allow (64 x 64 of 64 x 64 for 4096), or `block=(m2, n2)`.
Deviations: the frozen residual is an exact sum, and the SVD exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.linalg.kronecker import balanced_divisor, kronecker_svd, rearrange
from weft.linalg.spectrum import rank_for_energy
from weft.linalg.svd import singular_values
from weft.methods.base import Method, Moments, Site, Split
from weft.methods.svfit import check_share
from weft.terms import Kronecker, Shifted

__all__ = ["METHOD", "blocks", "elbow_of", "split", "spread"]


def split(site: Site, *, energy: float | None, elbow: bool, block: Sequence[int] | None) -> Split:
    """The principal products, taken out of the base."""
    U, s, V = kronecker_svd(site.weight(), blocks(*site.shape, block), site.rank)
    root = s.sqrt().view(-1, 1, 1)
    return Split({"": Shifted.from_term(Kronecker.from_factors((root * U).to(site.dtype), (root * V).to(site.dtype)))})


def spread(
    moments: Mapping[str, Moments], shapes: Mapping[str, tuple[int, int]], rank: int, options: Mapping[str, Any]
) -> dict[str, int]:
    """How many products each weight asks for, at most `rank`."""
    check_share("energy", options["energy"])
    counts = {}
    for name, shape in shapes.items():
        s = singular_values(rearrange(moments[name]["weight"], blocks(*shape, options["block"])))
        enough = rank_for_energy(s, options["energy"]) if options["energy"] else len(s)
        counts[name] = max(1, min(rank, enough, elbow_of(s) if options["elbow"] else len(s)))
    return counts


def blocks(out_features: int, in_features: int, block: Sequence[int] | None) -> tuple[int, int]:
    """(m1, n1). Raises WeftError for a block that does not divide the weight."""
    if block is None:
        return balanced_divisor(out_features), balanced_divisor(in_features)
    m2, n2 = block
    if min(m2, n2) < 1 or out_features % m2 or in_features % n2:
        raise WeftError(
            f"Blocks of {m2} x {n2} do not divide a weight of {out_features} x {in_features}; choose another block=, "
            "or leave it out for the most square ones."
        )
    return out_features // m2, in_features // n2


def elbow_of(s: Tensor) -> int:
    """How many values come before the point of log s that lies farthest below the line from its first to its last.

    Values that are zero to rounding do not count. Where no point lies a tenth of the line's fall below it, there is no
    elbow, and all values are kept.
    """
    logs = s[s > 1e-6 * s[:1]].double().log()
    if len(logs) < 3:
        return len(logs)
    chord = torch.linspace(0, 1, len(logs), dtype=torch.float64, device=logs.device)
    depth = logs[0] + (logs[-1] - logs[0]) * chord - logs
    return int(depth.argmax()) if depth.max() > 0.1 * (logs[0] - logs[-1]) else len(logs)


def limit(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """As many products as the rearranged weight has singular values."""
    m1, n1 = blocks(out_features, in_features, options["block"])
    return min(m1 * n1, out_features * in_features // (m1 * n1))


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    m1, n1 = blocks(out_features, in_features, options["block"])
    return rank * (m1 * n1 + out_features * in_features // (m1 * n1))


METHOD = Method(
    name="soka",
    kind="adapt",
    summary="The principal Kronecker products of the weight trained, as many as its spectrum suggests.",
    paper="Chong and Qu, 2025, arXiv 2506.15251",
    split=split,
    count=_count,
    limit=limit,
    spread=spread,
    defaults={"energy": 0.9, "elbow": True, "block": None},
)
