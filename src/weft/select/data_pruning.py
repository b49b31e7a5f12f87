"""data-pruning: the examples farthest from the prototypes of their kind, or the nearest (Sorscher et al., 2022, arXiv
2206.14486).

    score = 1 - max_k e . c_k over the centres c of k-means on embeddings e of unit length
    keep the hardest (large scores) of much data, the easiest of little

Hard includes mislabelled and garbage: filter first.
Deviations: embeddings are the model's own last states, as in `rds-plus`; `floor` is the share of each cluster that is
kept in any case, which the paper calls class balance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.select.base import Chosen, Selection
from weft.select.clusters import nearest_centres, spherical_k_means

__all__ = ["SELECTION", "choose"]


def choose(
    E: Tensor,
    count: int,
    query: Tensor | None = None,
    seed: int = 0,
    *,
    clusters: int = 20,
    hard: bool = True,
    floor: float = 0.5,
) -> Chosen:
    """Of E (n, d), the `count` of the largest scores, or of the smallest; of each cluster, at least `floor` of its fair
    part.
    """
    if clusters < 1 or not 0 <= floor <= 1:
        raise WeftError("data-pruning takes clusters from 1, and a floor between 0 and 1.")
    centres = spherical_k_means(E, min(clusters, len(E)), seed)
    likeness, cluster = nearest_centres(E, centres)
    scores = (1 - likeness).clamp(min=0)
    order = scores.argsort(descending=hard, stable=True)
    kept: dict[int, None] = {}
    for k in range(len(centres)):
        own = order[cluster[order] == k]
        kept.update(dict.fromkeys(own[: int(floor * count * len(own) / len(E))].tolist()))
    for i in order.tolist():
        if len(kept) >= count:
            break
        kept.setdefault(i)
    place = torch.empty(len(E), dtype=torch.long)
    place[order] = torch.arange(len(E))
    chosen = torch.tensor(list(kept), dtype=torch.long)[:count]
    return Chosen(chosen[place[chosen].argsort()], scores if hard else -scores)


SELECTION = Selection(
    name="data-pruning",
    summary="The examples farthest from the centres of their clusters, or the nearest.",
    paper="Sorscher et al., 2022, arXiv 2206.14486",
    choose=choose,
    reads="distance to the nearest prototype: large is hard or atypical",
    defaults={"clusters": 20, "hard": True, "floor": 0.5},
)
