"""Optimizers: subspace methods as one algebra (`LowRank`), the published presets, and how they are found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.optim.base import Refresh
from weft.optim.lowrank import LowRank
from weft.optim.parameters import split_parameters
from weft.optim.per_layer import PerLayer
from weft.optim.presets import (
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    frugal,
    galore,
    galore_8bit,
    gradnormlorp,
)
from weft.optim.weightnorm import fold_weights, normalize_weights

__all__ = [
    "OPTIMIZERS",
    "LowRank",
    "PerLayer",
    "Refresh",
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "fira",
    "fold_weights",
    "frugal",
    "galore",
    "galore_8bit",
    "gradnormlorp",
    "normalize_weights",
    "split_parameters",
]

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    preset.__name__: preset
    for preset in (galore, galore_8bit, fira, frugal, apollo, apollo_mini, dct_adamw, gradnormlorp)
}
