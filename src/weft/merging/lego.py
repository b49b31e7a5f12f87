"""lego: cluster the ranks of all adapters, and make one rank of each cluster (LoRA-LEGO, 2024, arXiv 2409.16167).

A rank is a unit: a row a (in,) of A with the matching column b (out,) of B. The N units of n adapters are pooled and
clustered by k-means into k; a centroid is the mean of its members, each half scaled back to the members' mean norm
(averaging shrinks it); the merged delta is the sum of the k centroids times sqrt(r / k), r = N / n.

A unit is known only up to (c a, b / c), so first |a| = |b|, and the largest entry of a is positive: otherwise two equal
updates of opposite sign would average to nothing. The pool is sorted, so that the order of ranks and adapters does not
matter. `canonical` also removes the freedom to mix the ranks of one adapter, by its SVD.
Deviations: the norm is Euclidean (code of third parties uses the largest entry); r is the mean rank where ranks differ;
k-means++ starts and several restarts (third parties: one random start); empty clusters take the farthest unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.linalg.svd import product_factors
from weft.merging.base import Merger, Pair
from weft.merging.sums import side_by_side

__all__ = ["MERGER", "kmeans", "lego", "lloyd", "units"]

STEPS = 100
"""Lloyd iterations at most; a few tens are used."""


def lego(
    pairs: Sequence[Pair],
    rank: int,
    generator: torch.Generator,
    *,
    canonical: bool = False,
    normalise: bool = True,
    reweight: bool = True,
    restarts: int = 8,
) -> Pair:
    """One rank for each of `rank` clusters of units.

    Args:
        canonical: take the units of each adapter's SVD instead of those it was trained in.
        normalise: cluster by the directions [a / |a|, b / |b|]; else by [a, b], in which large units dominate.
        reweight: multiply the merged delta by sqrt(r / k).
        restarts: of k-means; the tightest clustering is taken.
    """
    a, b = units([product_factors(*pair) for pair in pairs] if canonical else pairs)
    halves = [F.normalize(half, dim=1) for half in (a, b)] if normalise else [a, b]
    labels = kmeans(torch.cat(halves, dim=1), rank, generator, restarts)
    gain = (len(a) / len(pairs) / rank) ** 0.5 if reweight else 1.0
    root = gain**0.5
    return root * _centroids(b, labels, rank).mT, root * _centroids(a, labels, rank)


def units(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """a (N, in) and b (N, out) of all ranks: |a| = |b|, the largest entry of a positive, sorted; zero where b a is."""
    B, a = side_by_side(pairs)
    b = B.mT
    size = (a.norm(dim=1) * b.norm(dim=1)).sqrt().unsqueeze(1)
    sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    # F.normalize leaves a zero half zero, and size is then zero for the other one too
    a, b = sign * size * F.normalize(a, dim=1, eps=1e-300), sign * size * F.normalize(b, dim=1, eps=1e-300)
    entries = torch.cat([a, b], dim=1).tolist()
    order = torch.tensor(sorted(range(len(entries)), key=entries.__getitem__))
    return a[order], b[order]


def kmeans(points: Tensor, k: int, generator: torch.Generator, restarts: int = 8) -> Tensor:
    """The cluster of each of the points (N, d), in 0 .. k - 1: the tightest of several runs. k = N keeps them apart."""
    if k >= len(points):
        return torch.arange(len(points))
    runs = [lloyd(points, _spread(points, k, generator)) for _ in range(max(restarts, 1))]
    return min(runs, key=lambda labels: float(_spans(points, labels, k)))


def lloyd(points: Tensor, centres: Tensor) -> Tensor:
    """Lloyd's iteration from these centres (k, d) until no point changes its cluster: labels (N,)."""
    labels = torch.full((len(points),), -1)
    for _ in range(STEPS):
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest, assigned = distances.min(dim=1)
        _fill_empty(assigned, nearest, len(centres))
        if torch.equal(assigned, labels):
            break
        labels = assigned
        centres = torch.where(_sizes(labels, len(centres)) > 0, _means(points, labels, len(centres)), centres)
    return labels


def _fill_empty(labels: Tensor, distances: Tensor, k: int) -> None:
    """Give each cluster without members the point that is farthest from its own centre, in place."""
    for cluster in range(k):
        if not (labels == cluster).any():
            farthest = int(distances.argmax())
            if distances[farthest] == 0:
                return  # fewer distinct points than clusters: the rest stay empty
            labels[farthest], distances[farthest] = cluster, 0.0


def _spread(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the points, each drawn in proportion to its squared distance from those before (Arthur, 2007)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        uniform = torch.ones_like(distances)
        chosen.append(int(torch.multinomial(distances if distances.any() else uniform, 1, generator=generator)))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def _centroids(half: Tensor, labels: Tensor, k: int) -> Tensor:
    """The mean of each cluster's members (k, d), scaled to their mean norm; zero for an empty cluster."""
    norms = _means(half.norm(dim=1, keepdim=True), labels, k)
    return F.normalize(_means(half, labels, k), dim=1, eps=1e-300) * norms


def _means(points: Tensor, labels: Tensor, k: int) -> Tensor:
    total = points.new_zeros(k, points.shape[1]).index_add(0, labels, points)
    return total / _sizes(labels, k).clamp(min=1)


def _sizes(labels: Tensor, k: int) -> Tensor:
    return torch.bincount(labels, minlength=k).unsqueeze(1)


def _spans(points: Tensor, labels: Tensor, k: int) -> Tensor:
    """The sum of squared distances to the centres."""
    return (points - _means(points, labels, k)[labels]).square().sum()


MERGER = Merger(
    name="lego",
    summary="one rank for each cluster of the adapters' ranks",
    paper="Zhao et al., 2024, arXiv 2409.16167",
    merge=lego,
    ranked=True,
    defaults={"canonical": False, "normalise": True, "reweight": True, "restarts": 8},
)
