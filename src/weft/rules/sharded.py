"""Whole tensors out of FSDP2's shards and back, for rules whose arithmetic needs all of a small tensor on every
process.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["sharded_like", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """All of a possibly sharded tensor; communicates, so call it on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """This process's part of `value`, which is the same on all of them, laid out as `reference` is."""
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
