"""Schedules that follow the run: periods found from its length, the peak learning rate, and what comes too late is not
passed over in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import nn

from weft.errors import WeftError

__all__ = ["in_time", "length", "peak_rate", "period"]


def length(steps: int | None, what: str) -> int:
    """The steps of the run. Raises WeftError where they are not known, and `what` follows them."""
    if steps is None:
        raise WeftError(
            f"{what} follows the length of the run, which is not known here: start the rules with it, "
            "Rules(weft.verbs.adapt.rules(model)).start(model, steps=...), or give the method its schedule in steps."
        )
    return steps


def period(given: int | None, steps: int | None, *, share: float, most: int, what: str) -> int:
    """Steps between two events: those given, or this share of the run, at most `most`, the published number.

    Raises WeftError, or warns, where none of the events comes before the last step (`in_time`).
    """
    every = max(1, min(most, int(share * length(steps, what)))) if given is None else given
    if every < 1:
        raise WeftError(f"{what} is {every} steps: give 1 or more.")
    return in_time(every, steps, what, given=given is not None)


def in_time(first: int, steps: int | None, what: str, *, given: bool = True) -> int:
    """`first`, the step after which something happens for the first time.

    Raises WeftError where no step follows it. If it was not `given`, but found from the steps, these are too few for
    any schedule: a warning then says so.
    """
    if steps is not None and first >= steps:
        sentence = f"{what} is {first} steps and the run has {steps}, so that it never takes effect"
        if given:
            raise WeftError(f"{sentence}; give fewer than {steps} steps, or train longer.")
        warnings.warn(f"{sentence}; train longer.", stacklevel=2)
    return first


def peak_rate(optimizer: torch.optim.Optimizer | None, parameters: Collection[nn.Parameter], what: str) -> float:
    """The highest rate at which the optimizer will step these parameters, before any schedule of rates.

    Raises WeftError where no optimizer is bound, or it steps none of them.
    """
    mine = {id(parameter) for parameter in parameters}
    groups = optimizer.param_groups if optimizer is not None else []
    rates = [float(g.get("initial_lr", g["lr"])) for g in groups if any(id(p) in mine for p in g["params"])]
    if not rates:
        raise WeftError(
            f"{what} follows the learning rate, and no optimizer of its parameters is bound: call bind first."
        )
    return max(rates)
