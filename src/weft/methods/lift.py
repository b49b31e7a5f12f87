"""lift: train the entries of each weight at which its low-rank approximation is largest (Liu et al., 2025, arXiv
2506.00772, section 3).

    W = U S V;   L = U_f S_f V_f;   mask = the K entries of largest |L|;   K = min(q (in + out), in out)
    K trainable numbers

q is the rank, so the budget is a LoRA's; f is `filter_rank`, at most min(in, out). Every `interval` steps the mask is
found again from the weight as it then is; what was learned on entries that leave the mask stays, moments of entries
that stay in it go on, newcomers start from zero. `interval` is by default a fifth of the run, and at most 400, which is
about the ratio on MATH-10K (400 of 1,875 steps).
Deviations: the largest entries, as in the paper: the released optimizer takes them only where the name of its mask says
"largest", and the scripts released with it say `lift_sparse`, which trains the *smallest*; the change of W is a sparse
term beside it, in fp32: the entries in the mask are trained, those that have left it are kept in the same file, and
removal restores W. Newcomers' moments have an age of their own, where the released optimizer corrects them with the
run's step count, which makes their first update 0.45 of the learning rate. Under FSDP2 the optimizer is torch's AdamW,
which has one age for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split
from weft.methods.random_mask import entry_count
from weft.optim.entries import EntryAdamW
from weft.rules.principal_mask import PrincipalMask, principal_entries
from weft.terms import MovingSparse

__all__ = ["METHOD", "entry_optimizer", "split"]


def split(site: Site, *, filter_rank: int, randomized: bool, **_: Any) -> Split:
    """Zeros at the principal entries."""
    if filter_rank < 1:
        raise WeftError(f"filter_rank is {filter_rank}: give the rank of the approximation, at least 1 (default 64).")
    count = entry_count(*site.shape, site.rank, {})
    chosen = principal_entries(site.weight(), filter_rank, count, randomized=randomized, generator=site.generator)
    return Split({"": MovingSparse.at(chosen, *site.shape, dtype=site.dtype)})


def entry_optimizer(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float = 1e-6
) -> torch.optim.Optimizer:
    """AdamW with an age of each entry, on all entries of what is trained; torch's own where that is sharded."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return torch.optim.AdamW(groups, betas=betas, eps=eps)
    optimizer = EntryAdamW(groups, betas=betas, eps=eps)
    for parameter in parameters:
        optimizer.choose(parameter, torch.arange(parameter.numel()))
    return optimizer


def _optimizer(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    return entry_optimizer(groups, betas=(0.9, 0.95))


METHOD = Method(
    name="lift",
    kind="adapt",
    summary="Entries where the weight's low-rank approximation is largest, chosen anew as training goes on.",
    paper="Liu et al., 2025, arXiv 2506.00772",
    split=split,
    count=entry_count,
    rules=(PrincipalMask,),
    optimizer=_optimizer,
    defaults={"filter_rank": 64, "interval": None, "randomized": False},
)
