"""Digests of tensors where they lie, a chunk at a time: whether what a file was made of is what is there now.

The sums are of integers, so they depend neither on the order of additions nor on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["tensors_digest"]

CHUNK = 2**20


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the values, shapes and dtypes of some tensors."""
    digest = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}{_sums(local.detach())}".encode())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> tuple[int, int]:
    """Of the bits of a tensor, and of the same times their places, modulo 2^64."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    bits = flat.view(torch.int32) if len(flat) % 4 == 0 and flat.storage_offset() % 4 == 0 else flat
    plain, placed = 0, 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        plain += int(part.sum())
        placed += int(places.mul_(2654435761).mul_(part).sum())  # Knuth's multiplicative hashing
    return plain % 2**64, placed % 2**64
