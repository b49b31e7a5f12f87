"""Random numbers that are named, not stored: a seed is a pure function of (base seed, step, parameter, ...).

Noise over a tensor is drawn in runs of `chunk` entries, each from its own seed, so that any slice of a tensor (a
shard, a piece small enough for the cache) can be drawn again by itself, at any later time, bit for bit on the same
kind of device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from weft.seeds import mix

__all__ = ["Draw", "normal", "runs", "signs", "uniform"]

Draw = Callable[[int, int, torch.device], Tensor]
"""(seed, size, device) -> (size,) fp32."""


def runs(
    draw: Draw, seed: int, numel: int, device: torch.device, chunk: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Noise for the entries start .. stop of a flat tensor of `numel`, as (first, last + 1, values) for each chunk.

    A chunk is always drawn whole, so that every slice sees the noise of the whole tensor.
    """
    stop = numel if stop is None else stop
    for number in range(start // chunk, -(-stop // chunk)):
        first, last = number * chunk, min((number + 1) * chunk, numel)
        low, high = max(start, first), min(stop, last)
        yield low, high, draw(mix(seed, number), last - first, device)[low - first : high - first]


def normal(seed: int, size: int, device: torch.device) -> Tensor:
    """(size,) fp32 standard normal numbers."""
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device)


def signs(seed: int, size: int, device: torch.device) -> Tensor:
    """(size,) fp32 numbers, -1 or 1 with equal probability; 64 from each random word, so cheaper than `normal`."""
    words = torch.empty(-(-size // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    places = torch.arange(8, dtype=torch.uint8, device=device)
    bits = words.view(torch.uint8).unsqueeze(1).bitwise_right_shift(places).bitwise_and_(1)
    return bits.flatten()[:size].to(torch.float32).mul_(2).sub_(1)


def uniform(seed: int, size: int, device: torch.device) -> Tensor:
    """(size,) fp32 numbers in [0, 1)."""
    return torch.rand(size, generator=torch.Generator(device).manual_seed(seed), device=device)
