"""k-means on vectors of unit length, from a seed alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["nearest_centres", "spherical_k_means"]


def spherical_k_means(E: Tensor, k: int, seed: int, rounds: int = 20) -> Tensor:
    """Centres (k, d) of unit length: farthest points first, from a drawn one, then Lloyd's rounds until nothing moves.

    A cluster that loses all of its members keeps its centre.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = E[_apart(E, k, int(torch.randint(len(E), (1,), generator=generator)))]
    before = None
    for _ in range(rounds):
        members = nearest_centres(E, centres)[1]
        if before is not None and torch.equal(members, before):
            break
        sums = torch.zeros_like(centres).index_add_(0, members, E)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
        before = members
    return centres


def nearest_centres(E: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine to the nearest centre (n,), and which it is (n,)."""
    found = (E @ centres.mT).max(1)
    return found.values, found.indices


def _apart(E: Tensor, k: int, first: int) -> list[int]:
    places = [first]
    nearest = E @ E[first]
    while len(places) < k:
        places.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, E @ E[places[-1]])
    return places
