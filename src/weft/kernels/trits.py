"""Numbers -1, 0 and 1 times one scale, and their storage: five of them a byte, as the digits of a number to base 3.

    g = mean |W| or median |W|, at least 1e-5;   t = clip(round(W / g), -1, 1)

3^5 = 243 of the 256 values of a byte are used: 1.6 bits a number, where log2(3) is 1.585.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.tables import table

__all__ = ["SCALES", "TRITS", "packed_trits", "scale_of", "to_trits", "trits_of", "trits_size"]

SCALES = ("median", "mean")
TRITS = 5
"""Numbers a byte."""
_LEAST = 1e-5


@table
def _powers() -> list[int]:
    return [81, 27, 9, 3, 1]


def scale_of(W: Tensor, scale: str) -> Tensor:
    """g (): the "mean" or the "median" of |W|; of an even number of entries the lower of the two in the middle."""
    size = W.abs()
    return (size.mean() if scale == "mean" else size.flatten().median()).clamp(min=_LEAST)


def to_trits(W: Tensor, g: Tensor) -> Tensor:
    """The nearest of -1, 0 and 1 for each W / g, in the dtype of W; halves go to 0."""
    return torch.round(W / g).clamp_(-1, 1)


def trits_size(count: int) -> int:
    """Bytes of so many."""
    return -(-count // TRITS)


def packed_trits(trits: Tensor) -> Tensor:
    """-1, 0 and 1 (n,) of any dtype -> bytes (trits_size(n),), the last one filled up with zeros (the digit 1)."""
    digits = F.pad(trits.to(torch.int16) + 1, (0, -trits.numel() % TRITS), value=1).view(-1, TRITS)
    return (digits * _powers(device=trits.device, dtype=torch.int16)).sum(1).to(torch.uint8)


def trits_of(packed: Tensor, count: int) -> Tensor:
    """The first `count` of them (count,) int8."""
    powers = _powers(device=packed.device, dtype=torch.uint8)
    digits = torch.div(packed.unsqueeze(1), powers, rounding_mode="floor").remainder_(3)
    return (digits.to(torch.int8) - 1).flatten()[:count]
