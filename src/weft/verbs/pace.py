"""How fast a pre-training run goes: the rate's factor at each step, and when an optimizer's subspace is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import WeftError, unknown
from weft.optim import Refresh, schedules
from weft.rules.schedule import in_time
from weft.train.optimizers import default_options
from weft.train.recipe import Recipe

__all__ = ["period_of", "schedule_of"]


def period_of(optimizer: str, options: Mapping[str, Any]) -> int | None:
    """Steps between two refreshes of the optimizer's subspace, or None where it has none."""
    refresh = options.get("refresh", default_options(optimizer).get("refresh"))
    every = refresh.every if isinstance(refresh, Refresh) else refresh
    if every is not None and (not isinstance(every, int) or every < 1):
        raise WeftError(f"refresh is {every!r}: give the steps between two, at least 1.")
    return every


def schedule_of(name: str, recipe: Recipe, restart: int, period: int | None) -> schedules.Schedule:
    """The factor of the peak rate at each step, warmed up again after each `period` where `restart` asks for it."""
    plans = {
        "cosine": lambda: schedules.cosine(recipe.steps, recipe.warmup),
        "wsd": lambda: schedules.wsd(recipe.steps, recipe.warmup, max(1, recipe.steps // 5)),
        "constant": lambda: schedules.constant(recipe.warmup),
    }
    if name not in plans:
        raise unknown("learning-rate schedule", name, plans)
    if not restart:
        return plans[name]()
    if period is None:
        raise WeftError("--restart warms up after each new subspace, and this optimizer has none: add --reset-moments.")
    in_time(period, recipe.steps, "The interval between two new subspaces, or resets, that --restart follows,")
    return schedules.restarted(plans[name](), period, restart)
