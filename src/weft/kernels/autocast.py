"""Autocast, on devices that know it and on those, like meta, that raise when asked."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["compute_dtype", "without_autocast"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x is computed in: autocast's if it is on, else that of x."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which autocast is off for the device of x."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
