"""From a name and options to an optimizer, in one place: what the run, the model's size and the user say, checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from weft.errors import WeftError, unknown
from weft.optim import OPTIMIZERS, Optimizer
from weft.optim.presets import Options
from weft.optim.record import GIVEN

__all__ = ["check_options", "chosen_options", "default_options", "default_rate", "find_optimizer", "make_optimizer"]


def make_optimizer(
    name: str,
    model: nn.Module | Iterable[dict[str, Any]],
    lr: float,
    weight_decay: float,
    seed: int,
    options: Mapping[str, Any],
    base: nn.Module | None = None,
    decay: str = "sqrt",
) -> torch.optim.Optimizer:
    """The optimizer called `name` on the trainable parameters of `model`, or on groups.

    Args:
        options: of this optimizer: rank, refresh, scale, betas ...; lists count as tuples, and a dtype may be a name.
        base: for "adamw", the narrow model of width scaling, and `decay` how weight decay scales
            (`weft.optim.mup.mup_groups`).

    Raises:
        WeftError: an unknown name, an option that it has not, or a value that does not fit it or the model.
    """
    values = {key: _value(key, value) for key, value in options.items()}
    check_options(name, values)
    width = {"base": base, "decay": decay} if base is not None else {}
    made: torch.optim.Optimizer = find_optimizer(name)(
        model, lr=lr, weight_decay=weight_decay, seed=seed, **width, **values
    )
    return made


def find_optimizer(name: str) -> Optimizer:
    """The record of an optimizer that the training loop can run.

    Raises WeftError for an unknown name, and for what takes a loop of its own, with the reason.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    found = OPTIMIZERS[name]
    if found.loop:
        raise WeftError(f"--optimizer {name} cannot be used here. {found.loop}")
    return found


def chosen_options(name: str, options: Mapping[str, Any], steps: int, model: nn.Module | None = None) -> dict[str, Any]:
    """The options that a run of `steps` uses: those given, and beside them the published ones that follow the length of
    the run and, with a model, its size.
    """
    found = find_optimizer(name)
    sized = {} if model is None else found.for_size(model)
    return {**found.for_run(steps), **sized, **options}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises WeftError for an unknown optimizer, an option that it has not, and a value of a kind it does not take."""
    known = default_options(name)
    hints = get_type_hints(Options) | get_type_hints(_maker(name))
    for key, given in options.items():
        if key not in known:
            raise WeftError(f"The optimizer {name!r} has no option {key!r}; it has: {', '.join(sorted(known))}.")
        value = _value(key, given)
        if not _fits(value, hints[key]):
            raise WeftError(f"{key} is {given!r} for {name}, which takes {_described(hints[key])}.")
        if key == "betas" and not all(0 <= beta < 1 for beta in value):
            raise WeftError(f"betas is {given!r} for {name}: give numbers from 0 to below 1.")


def default_options(name: str) -> dict[str, Any]:
    """Every option of an optimizer with its published default; None for those that all presets share."""
    found = find_optimizer(name)
    several = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(found.make).parameters.values())
    shared = {key: None for key in get_type_hints(Options) if key not in GIVEN} if several else {}
    return {**shared, **found.defaults}


def default_rate(name: str) -> float:
    """The published peak learning rate."""
    return find_optimizer(name).rate


def _maker(name: str) -> Any:
    """What the record makes by; a class's hints are its constructor's."""
    make = find_optimizer(name).make
    return make.__init__ if inspect.isclass(make) else make


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that a type hint names."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple and parts[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float) and isinstance(value, bool):
        return False
    kinds: Any = (int, float) if hint is float else origin or hint
    return isinstance(value, kinds)


def _described(hint: Any) -> str:
    """A hint in words: the choices of a Literal, or the type."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_described, get_args(hint)))
    return ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else inspect.formatannotation(hint)


def _value(name: str, value: Any) -> Any:
    """Tuples and dtypes, which JSON has no words for, and a single part of a name for several."""
    if name == "state_dtype" and isinstance(value, str):
        dtype = getattr(torch, value, None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise WeftError(f"state_dtype is {value!r}: give the name of a dtype, such as float32 or bfloat16.")
        return dtype
    if name == "exclude" and isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value
