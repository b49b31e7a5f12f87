"""Which layers of a model an adapter goes on, by names and patterns, and what rank each gets."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from weft.errors import WeftError, nearest
from weft.methods.base import Method
from weft.records import Record
from weft.terms.hooks import check_at_hand
from weft.terms.layers import eligible, linear_layers, open_meant, picked, shape_of

__all__ = ["ALL", "check_targets", "ranks_of", "resolve_targets"]

ALL = "all-linear"


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers that `targets` mean, by name.

    Raises:
        WeftError: a target matches nothing (the nearest names are listed), or they leave no layer.
    """
    if targets == ALL:
        return linear_layers(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    open_meant(model, targets, _meant)
    layers = eligible(model)
    for target in targets:
        plain = target.removeprefix("!")
        if not any(_meant(name, plain) for name in layers):
            suffixes = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            near = nearest(plain, [*suffixes, *layers] if "." in plain else suffixes)
            raise WeftError(f"The target {target!r} matches no linear layer; the nearest names are: {', '.join(near)}.")
    chosen = {name: layers[name] for name in picked(layers, targets, _meant)}
    check_at_hand(model, chosen)
    return chosen


def check_targets(method: Record, targets: str | Sequence[str] | None, model: nn.Module | None = None) -> None:
    """Raises WeftError for targets of a method that is no adapter, or that match nothing in the model."""
    if targets and method.kind != "adapt":
        raise WeftError(f"Targets are layers that get an adapter, and {method.name} is none: leave them out.")
    if targets and model is not None:
        resolve_targets(model, targets)


def _meant(name: str, target: str) -> bool:
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")


def ranks_of(
    model: nn.Module,
    method: Method,
    rank: int,
    targets: str | Sequence[str],
    ranks: Mapping[str, int] | None,
    options: Mapping[str, Any],
) -> dict[str, int]:
    """layer -> rank. Where all layers are meant, those too small for `rank`, such as the gate of a shared expert, get
    the largest that they can have, and a warning says so.

    Raises:
        WeftError: a rank that is none of the layer it is given to, or that no layer has; nothing to adapt.
    """
    layers = resolve_targets(model, targets)
    wanted = dict.fromkeys(layers, rank) if ranks is None else _given(layers, ranks)
    most = {name: method.limit(*shape_of(layers[name]), options) for name in wanted}
    small = [name for name, r in wanted.items() if r > most[name]]
    if targets == ALL and ranks is None and 0 < len(small) < len(wanted):
        warnings.warn(
            f"Rank {rank} is more than {len(small)} of {len(wanted)} layers can have, such as "
            f"{_told(layers, small[0])}: they get the largest that is possible.",
            stacklevel=3,
        )
        wanted = {name: min(r, most[name]) for name, r in wanted.items()}
    strange = next((name for name, r in wanted.items() if not 1 <= r <= most[name]), None)
    if strange is not None:
        raise WeftError(
            f"Rank {wanted[strange]} is not possible for {method.name!r} on {_told(layers, strange)}; give a rank from "
            f"1 to {most[strange]}, or leave the layer out with targets=."
        )
    if not wanted:
        raise WeftError("No layer is given a rank above 0, so there is nothing to adapt; check ranks=.")
    return wanted


def _given(layers: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks that the user gave, those of 0 left out."""
    strange = next((name for name in ranks if name not in layers), None)
    if strange is not None:
        raise WeftError(
            f"There is no targeted layer {strange!r} to give a rank; the nearest names are: "
            f"{', '.join(nearest(strange, layers))}."
        )
    return {name: ranks[name] for name in layers if ranks.get(name)}


def _told(layers: Mapping[str, nn.Module], name: str) -> str:
    out, inn = shape_of(layers[name])
    return f"{name} ({out} x {inn})"
