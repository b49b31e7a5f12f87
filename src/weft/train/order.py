"""Which rows each step sees, and the random numbers it draws: pure functions of the seed and the step.

So a resumed run repeats nothing and skips nothing, and draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from weft.seeds import derived_seed

__all__ = ["Order"]


class Order(Sampler[int]):
    """`count` row indices: every row once an epoch, each epoch in an order of its own drawn from (seed, epoch)."""

    def __init__(self, rows: int, count: int, seed: int) -> None:
        self.rows, self.count, self.seed = rows, count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.count, self.rows):
            generator = torch.Generator().manual_seed(derived_seed(self.seed, start // self.rows))
            yield from torch.randperm(self.rows, generator=generator)[: self.count - start].tolist()
