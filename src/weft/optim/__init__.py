"""Optimizers: subspace methods as one algebra (`LowRank`), the published presets, and how they are found by name.

Example:
    >>> optimizer = weft.optim.fira(model, rank=4, lr=1e-2)
    >>> optimizer.state_bytes()
    0
"""

from __future__ import annotations

from weft.optim.adaptive_batch import AdaptiveBatch
from weft.optim.base import Refresh
from weft.optim.entries import Entries, EntryAdamW
from weft.optim.lowrank import LowRank
from weft.optim.mfac import MFAC, mfac
from weft.optim.muon import muon
from weft.optim.noise import add_gradient_noise
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
from weft.optim.published import OPTIMIZERS
from weft.optim.record import Optimizer
from weft.optim.scale import scale
from weft.optim.seed_log import SeedLog
from weft.optim.sinkgd import sign, sinkgd
from weft.optim.spectron import spectron
from weft.optim.sso import SSO
from weft.optim.weightnorm import fold_weights, normalize_weights
from weft.optim.whole import adagrad, adagrad_norm, adamw, adamw_8bit, adamw_fp8
from weft.optim.zeroth_order import Estimator, ZerothOrder, mezo, replay

__all__ = [
    "MFAC",
    "OPTIMIZERS",
    "SSO",
    "AdaptiveBatch",
    "Entries",
    "EntryAdamW",
    "Estimator",
    "LowRank",
    "Optimizer",
    "PerLayer",
    "Refresh",
    "SeedLog",
    "ZerothOrder",
    "adagrad",
    "adagrad_norm",
    "adamw",
    "adamw_8bit",
    "adamw_fp8",
    "add_gradient_noise",
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "fira",
    "fold_weights",
    "frugal",
    "galore",
    "galore_8bit",
    "gradnormlorp",
    "mezo",
    "mfac",
    "muon",
    "normalize_weights",
    "replay",
    "scale",
    "sign",
    "sinkgd",
    "spectron",
    "split_parameters",
]
