"""gvm-raft: where samples lower the variance of the gradient most (GVM-RAFT, 2025, arXiv 2505.02391).

    n_i ~ G_i / sqrt(p_i + alpha p_i^(1 - beta)),   sum n_i = budget
    G_i: norm of the gradient of an accepted answer;  p_i: share of answers that are accepted

Without alpha it is the least of sum G_i^2 / (p_i n_i) under a fixed sum: Neyman's allocation of a stratified sample.
alpha gives up on what is hopeless. The same splits any budget over strata, such as calibration sequences over domains.

Source: github.com/RLHFlow/GVM; alpha = 1e-3 and beta = 2 are its settings.
Deviations: the allocation alone (`neyman`), and the choice of the records of the largest share, without the sampling
around it. Training on n_i samples weighs a question n_i times: divide each one's sum by n_i.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.select.base import Chosen, Selection

__all__ = ["SELECTION", "choose", "neyman", "weights"]


def figures(record: Mapping[str, Any]) -> list[float]:
    """A record's gradient norm and accepted share."""
    return [float(record["gradient"]), float(record["accepted"])]


def weights(G: Tensor, p: Tensor, *, alpha: float = 1e-3, beta: float = 2.0) -> Tensor:
    """What the samples of each stratum are in proportion to; 0 where G or p is."""
    there = (G > 0) & (p > 0)
    p = torch.where(there, p, torch.ones_like(p))
    return torch.where(there, G / (p + alpha * p ** (1 - beta)).sqrt(), torch.zeros_like(G))


def neyman(shares: Tensor, budget: int) -> Tensor:
    """(n,) int64 samples in proportion to shares (n,), of this sum exactly: the largest remainders are rounded up."""
    if not bool((shares > 0).any()):
        raise WeftError("No stratum has anything to gain from samples: every gradient or accepted share is zero.")
    exact = shares.double() / shares.double().sum() * budget
    counts = exact.floor().long()
    rest = (exact - counts).argsort(descending=True, stable=True)[: budget - int(counts.sum())]
    counts[rest] += 1
    return counts


def choose(
    S: Tensor, count: int, query: Tensor | None = None, seed: int = 0, *, alpha: float = 1e-3, beta: float = 2.0
) -> Chosen:
    """Of S (n, 2), gradient norm and accepted share, the largest weights."""
    G, p = S.double().unbind(1)
    if bool((G < 0).any()) or bool(((p < 0) | (p > 1)).any()):
        raise WeftError("gvm-raft takes a gradient norm from 0 and an accepted share between 0 and 1 of every record.")
    scores = weights(G, p, alpha=alpha, beta=beta)
    return Chosen(scores.argsort(descending=True, stable=True)[:count], scores)


SELECTION = Selection(
    name="gvm-raft",
    summary="Questions whose samples lower the variance of the gradient most.",
    paper="GVM-RAFT, 2025, arXiv 2505.02391",
    choose=choose,
    reads="what the number of its samples should be in proportion to",
    figures=figures,
    asks='"gradient", a norm, and "accepted", a share',
    defaults={"alpha": 1e-3, "beta": 2.0},
)
