"""Codes of few bits in 32-bit words, the lowest bits first and without gaps: how GPTQ's and compressed-tensors' files
hold them, whatever the width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) unsigned codes -> (rows, ceil(n bits / 32)) int32; code j fills the bits from j bits on of its row."""
    planes = np.unpackbits(codes.to(torch.uint8).numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = planes.reshape(len(codes), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32))


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: (rows, count) uint8."""
    stream = np.unpackbits(words.numpy().astype("<i4").view(np.uint8), axis=1, bitorder="little")
    planes = stream[:, : count * bits].reshape(len(words), count, bits)
    return torch.from_numpy(np.packbits(planes, axis=-1, bitorder="little")[..., 0])
