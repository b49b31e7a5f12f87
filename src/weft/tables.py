"""Small tables of numbers as tensors that are made once a device. To make one in a forward pass is to copy it from the
host: a GPU waits for the copy, and no CUDA graph can hold it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Table", "table"]


class Table(Protocol):
    """The tensor of a key; it is shared, and not to be changed."""

    def __call__(self, *key: Any, device: Any = None, dtype: torch.dtype = torch.float32) -> Tensor: ...


def table(numbers: Callable[..., Any]) -> Table:
    """A function of hashable arguments that gives (nested) numbers, as one that gives their tensor."""
    made: dict[Hashable, Tensor] = {}

    @functools.wraps(numbers)
    def tensor(*key: Any, device: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
        if torch.compiler.is_compiling():  # a constant of the graph
            return torch.tensor(numbers(*key), dtype=dtype, device=device)
        place = (key, str(device), dtype)
        if place not in made:
            with torch.inference_mode(False):
                new = torch.tensor(numbers(*key), dtype=dtype, device=device)
            if type(new) is not Tensor:  # a tracer's or a planner's stand-in
                return new
            made[place] = new
        return made[place]

    return tensor
