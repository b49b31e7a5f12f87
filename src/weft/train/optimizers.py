"""From a name and options to an optimizer: AdamW, by width where a base model is given, or one of
`weft.optim.OPTIMIZERS`. What is wrong with either is said in a sentence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from weft.errors import WeftError, unknown
from weft.optim import OPTIMIZERS
from weft.optim.mup import mup_groups
from weft.optim.parameters import split_parameters
from weft.optim.presets import Options

__all__ = ["WITHOUT_BACKWARD", "check_options", "default_options", "default_rate", "make_optimizer"]

WITHOUT_BACKWARD = ("mezo",)

_GIVEN = {"model", "model_or_groups", "lr", "weight_decay", "seed", "base", "decay"}  # by the recipe, not as options


def make_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    seed: int,
    options: Mapping[str, Any],
    base: nn.Module | None = None,
    decay: str = "sqrt",
) -> torch.optim.Optimizer:
    """The optimizer called `name` on the trainable parameters of `model`.

    Args:
        options: of this optimizer: rank, refresh, scale, betas ...; lists count as tuples, and a dtype may be a name.
        base: for "adamw", the narrow model of width scaling, and `decay` how weight decay scales
            (`weft.optim.mup.mup_groups`).

    Raises:
        WeftError: an unknown name, an option that it has not, or a value that does not fit it or the model.
    """
    chosen = {key: _value(key, value) for key, value in options.items()}
    check_options(name, chosen)
    if name == "adamw":
        return _adamw(model, lr, weight_decay=weight_decay, base=base, decay=decay, **chosen)
    made: torch.optim.Optimizer = OPTIMIZERS[name](model, lr=lr, weight_decay=weight_decay, seed=seed, **chosen)
    return made


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
    parameters = inspect.signature(_maker(name)).parameters.values()
    shared = dict.fromkeys(get_type_hints(Options)) if any(p.kind is p.VAR_KEYWORD for p in parameters) else {}
    own = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    return {key: value for key, value in (shared | own).items() if key not in _GIVEN}


def default_rate(name: str) -> float:
    """The published peak learning rate."""
    return float(inspect.signature(_maker(name)).parameters["lr"].default)


def _maker(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return _adamw
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, ["adamw", *OPTIMIZERS])
    return OPTIMIZERS[name]


def _adamw(
    model: nn.Module,
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    base: nn.Module | None = None,
    decay: Any = "sqrt",
) -> torch.optim.Optimizer:
    """torch's AdamW, with weight decay on the blocks' matrices alone."""
    if base is not None:
        groups = mup_groups(model, base, lr, weight_decay=weight_decay, decay=decay)
    else:
        matrices, others = split_parameters(model)
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps)


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
