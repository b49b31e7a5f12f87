"""What a training run is made of: fingerprints of its rows and of the weights that it does not train, kept beside its
checkpoints, so that a checkpoint is never gone on with on other data or another model.

The sums are of integers, so they depend neither on the order of additions nor on the device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.files import write_json

__all__ = ["check_identity", "frozen_digest", "tensors_digest", "weights_digest"]

FILE = "weft_identity.json"
CHUNK = 2**20


def check_identity(directory: Path, parts: Mapping[str, str], resumed: bool, write: bool) -> None:
    """Compare what a run is made of with what the run in `directory` was made of, and note it there.

    Args:
        parts: what it is in words -> digest.
        resumed: whether a checkpoint there is about to be gone on with.
        write: whether this process writes files.

    Raises WeftError naming what changed.
    """
    file = directory / FILE
    before = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    changed = [what for what in parts if before.get(what, parts[what]) != parts[what]]
    if changed:
        raise WeftError(
            f"The checkpoint in {directory} was trained with other inputs: {' and '.join(changed)} changed since; "
            "bring back what was there to go on, or train in a new directory."
        )
    if write:
        write_json(file, parts)


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the values, shapes and dtypes of some tensors."""
    digest = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}{_sums(local.detach())}".encode())
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A digest of the frozen weights, and of the names and shapes of all; what is trained lies in checkpoints."""
    named = sorted(model.named_parameters(remove_duplicate=False))
    layout = str([(name, tuple(p.shape), p.requires_grad) for name, p in named])
    frozen = (p for _, p in named if not p.requires_grad and not p.is_meta)
    return hashlib.blake2b(f"{layout}{tensors_digest(frozen)}".encode(), digest_size=12).hexdigest()


def frozen_digest(model: nn.Module) -> str:
    """The same of a model of which nothing is trained, with its buffers: codes are buffers."""
    buffers = (buffer for _, buffer in sorted(model.named_buffers()) if not buffer.is_meta)
    return weights_digest(model) + tensors_digest(buffers)


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
