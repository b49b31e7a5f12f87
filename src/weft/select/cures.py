"""cures: questions of middling difficulty for the model (CurES, 2025, arXiv 2510.01037).

    p = (right + 1) / (tried + 2)            mean of a Beta posterior, from a uniform prior
    weight = sqrt(p (1 - p)), largest at 1/2
    drawn without repeats in proportion to exp(weight / tau), or, for tau = 0, the largest

Answers that are all right, or all wrong, teach nothing by reinforcement. The counts come from sampled answers that a
verifier judged.

Source: github.com/ZexuSun/CurES.
Deviations: choice alone, without the reinforcement learning around it. Its tau of 100 and more makes all questions
equally likely in effect; 0.1 here. The number of answers a question gets is in `gvm-raft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.select.base import Chosen, Selection

__all__ = ["SELECTION", "choose", "posterior"]


def figures(record: Mapping[str, Any]) -> list[float]:
    """How many answers of a record were right, and how many were tried."""
    return [float(record["right"]), float(record["tried"])]


def posterior(right: Tensor, tried: Tensor) -> Tensor:
    """The mean share of right answers, never 0 or 1."""
    return (right + 1) / (tried + 2)


def choose(S: Tensor, count: int, query: Tensor | None = None, seed: int = 0, *, tau: float = 0.1) -> Chosen:
    """Of S (n, 2), right and tried; a score is sqrt(p (1 - p))."""
    right, tried = S.double().unbind(1)
    if bool((right < 0).any()) or bool((right > tried).any()) or tau < 0:
        raise WeftError("cures takes 0 <= right <= tried of every record, and tau from 0.")
    p = posterior(right, tried)
    scores = (p * (1 - p)).sqrt()
    keys = scores
    if tau:  # the largest of scores with Gumbel noise are draws without repeats
        noise = torch.rand(len(S), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        keys = scores / tau - (-noise.clamp(min=1e-300).log()).log()
    return Chosen(keys.argsort(descending=True, stable=True)[:count], scores)


SELECTION = Selection(
    name="cures",
    summary="Questions that the model answers right about half of the time.",
    paper="CurES, 2025, arXiv 2510.01037",
    choose=choose,
    reads="sqrt(p (1 - p)) of the share p of right answers: 0.5 is half of them",
    figures=figures,
    asks='"right" and "tried", numbers of answers',
    defaults={"tau": 0.1},
)
