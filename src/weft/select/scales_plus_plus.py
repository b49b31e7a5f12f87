"""scales-plus-plus: one example for each kind, to stand for all (Scales++, 2025, arXiv 2510.26384).

    k clusters of the examples' embeddings; of each, the example nearest to its centre, of weight members / n

for a small part of an evaluation whose weighted mean is near the mean of all. A random part of the same size is the
thing to beat: where answers are noisy, clusters gain little over it.

Deviations: clusters of the model's own last states, for the paper's sixteen scales of demands come from an annotator;
no UMAP; the anchors' estimate alone, without the fitted model of answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.select.base import Chosen, Selection
from weft.select.clusters import nearest_centres, spherical_k_means

__all__ = ["SELECTION", "choose"]


def choose(E: Tensor, count: int, query: Tensor | None = None, seed: int = 0) -> Chosen:
    """Of E (n, d), one of each of `count` clusters, the largest first, or fewer where examples are equal.

    A score is the share of examples that one stands for, 0 of all that stand for none.
    """
    centres = spherical_k_means(E, count, seed)
    likeness, cluster = nearest_centres(E, centres)
    scores = torch.zeros(len(E))
    for k in sorted(set(cluster.tolist())):
        inside = (cluster == k).nonzero().flatten()
        scores[inside[likeness[inside].argmax()]] = len(inside) / len(E)
    order = scores.argsort(descending=True, stable=True)[: int((scores > 0).sum())]
    return Chosen(order, scores)


SELECTION = Selection(
    name="scales-plus-plus",
    summary="One example for each cluster, with a weight: a small part that stands for an evaluation.",
    paper="Scales++, 2025, arXiv 2510.26384",
    choose=choose,
    reads="share of the examples that it stands for",
)
