"""torch.bucketize of numbers in [-1, 1] without its search, which is slow on a CPU.

The exponent and eight bits of the mantissa name a cell, and a table says how many edges lie below it; one comparison
decides the single edge that a cell may hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map

__all__ = ["Cells", "bucketize", "cells", "once"]

T = TypeVar("T")

# from 2^-24 to 1, 256 cells between two powers of 2; the first takes all that is smaller
_FIRST = (127 - 24) << 8
_COUNT = (24 << 8) + 1


class Cells(NamedTuple):
    """Edges prepared for `bucketize`."""

    below: Tensor  # (2 cells,) int32: edges below each cell, those of negative numbers last
    edges: Tensor  # (edges + 1,) fp32, rising, the last infinite


def cells(edges: Tensor) -> Cells:
    """The table of rising edges (n,) in [-1, 1], n < 256, on their device.

    Raises:
        ValueError: two edges share a cell: they are closer than 1/256 of their size, or than 2^-24.
    """
    starts = ((torch.arange(_COUNT + 1, dtype=torch.int32) + _FIRST) << 15).view(torch.float32)
    starts[0] = 0.0
    lowest, highest = torch.cat([starts[:-1], -starts[1:]]), torch.cat([starts[1:], -starts[:-1]])
    rising = edges.float().cpu()
    below = torch.searchsorted(rising, lowest, out_int32=True)
    if bool((torch.searchsorted(rising, highest) - below > 1).any()):
        raise ValueError("Two edges lie in one cell; use torch.bucketize.")
    return Cells(below.to(edges.device), torch.cat([rising, torch.tensor([torch.inf])]).to(edges.device))


def once(table: Callable[[Any, torch.device], T]) -> Callable[[Any, torch.device], T]:
    """A function of (sort, device) that makes tensors, each of which it makes once. Amid tensors without values
    (FakeTensorMode), they have theirs all the same, and none without is kept.
    """
    kept = functools.cache(table)

    @functools.wraps(table)
    def made(sort: Any, device: torch.device) -> T:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            return kept(sort, device)
        with unset_fake_temporarily():
            found = kept(sort, torch.device("cpu"))
        return tree_map(lambda tensor: tensor.to(device), found)  # type: ignore[no-any-return]

    return made


def bucketize(unit: Tensor, table: Cells) -> Tensor:
    """uint8 of the shape of `unit`: how many edges lie below each of its numbers, fp32 in [-1, 1]."""
    if unit.is_cuda:  # which searches faster than it gathers
        return torch.bucketize(unit, table.edges[:-1], out_int32=True).to(torch.uint8)
    key = (unit.abs().view(torch.int32).bitwise_right_shift_(15) - _FIRST).clamp_(0, _COUNT - 1)
    key.add_(unit < 0, alpha=_COUNT)
    least = table.below.index_select(0, key.flatten())
    index = least.add_(unit.flatten() > table.edges.index_select(0, least))
    return index.to(torch.uint8).view(unit.shape)
