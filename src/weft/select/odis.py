"""odis: the best of each uncorrelated kind of quality, for the best of a sum are all of one kind (ODiS, 2025, arXiv
2510.18909).

    z = V^T (s - mean) / deviation,   V: eigenvectors of the correlations of the rubrics' scores s
    each kept axis takes its best in turn

An axis is turned so that it agrees with the mean score. Axes of less than `share` of a rubric's variance are the
judge's noise, and are left out.

Deviations: the rubrics' scores are in the records (`"scores": {"fluency": 4, ...}`), where the paper trains a regressor
for each axis; axes take turns, where it gives each a budget of tokens. Only its abstract and a summary were at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.select.base import Chosen, Selection

__all__ = ["SELECTION", "axes", "choose"]


def figures(record: Mapping[str, Any]) -> list[float]:
    """A record's scores, by the names of its rubrics."""
    return [float(record["scores"][name]) for name in sorted(record["scores"])]


def axes(S: Tensor, share: float) -> Tensor:
    """(n, axes) uncorrelated scores of S (n, rubrics), by falling variance."""
    S = S.double()
    spread = S.std(0, correction=0)
    Z = (S - S.mean(0))[:, spread > 0] / spread[spread > 0]
    if not Z.shape[1]:
        raise WeftError("odis finds every record with the same scores: there is nothing to choose by.")
    variance, V = torch.linalg.eigh(Z.mT @ Z / len(Z))
    found = Z @ V[:, variance >= share].flip(1)
    agreement = found.mT @ Z.mean(1)
    return torch.where(agreement < 0, -found, found)


def choose(S: Tensor, count: int, query: Tensor | None = None, seed: int = 0, *, share: float = 0.1) -> Chosen:
    """Of S (n, rubrics), those that the axes take in turn; a score is the largest of an axis, in its deviations."""
    z = axes(S, share)
    wanted = [iter(column.argsort(descending=True, stable=True).tolist()) for column in z.mT]
    taken: dict[int, None] = {}
    while len(taken) < count:
        for choices in wanted:
            if len(taken) < count:
                taken[next(i for i in choices if i not in taken)] = None
    scores = (z / z.std(0, correction=0)).amax(1)
    return Chosen(torch.tensor(list(taken), dtype=torch.long), scores)


SELECTION = Selection(
    name="odis",
    summary="The best of each uncorrelated axis of quality scores, in turn.",
    paper="ODiS, 2025, arXiv 2510.18909",
    choose=choose,
    reads="largest score of an uncorrelated axis, in standard deviations",
    figures=figures,
    asks='"scores": {"rubric": number, ...}',
    defaults={"share": 0.1},
)
