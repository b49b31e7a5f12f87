"""RandomStore: frozen random matrices that every layer of a model takes slices of, computed from a seed, kept once and
never saved (RandLoRA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import unknown
from weft.linalg.counter import check_numbers, subseed, symmetric, uniform, verify

__all__ = ["LAWS", "RandomStore"]

LAWS = ("uniform", "sparse", "very_sparse")
"""Laws of an entry: uniform in [-1, 1); or -1, 0, 1 with probabilities 1/(2s), 1 - 1/s, 1/(2s), s = 3 or sqrt(short)
(Li et al., 2006)."""


class RandomStore:
    """B_n (long, r) for n = 1 .. N and one A (r, short), each set of entries divided by its own standard deviation.

    Computed when first needed, in fp32 on the CPU, so that every machine has the same bits; kept for each device that
    uses them. A copy or a pickle holds the recipe alone.

    Args:
        seed: of all entries.
        rank: r.
        products: N.
        long: the longer side of the largest layer.
        short: the largest of the layers' shorter sides.
        law: one of `LAWS`.
        check: the seed's first numbers, verified where given.

    Raises:
        WeftError: an unknown law, or the seed gives other numbers than `check` here.
    """

    def __init__(
        self,
        seed: int,
        rank: int,
        products: int,
        long: int,
        short: int,
        law: str = "uniform",
        check: Sequence[float] | None = None,
    ) -> None:
        if law not in LAWS:
            raise unknown("law of a random store", law, LAWS)
        if check is not None:
            verify(seed, list(check))
        self.seed, self.rank, self.products, self.long, self.short, self.law = seed, rank, products, long, short, law
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def recipe(self) -> dict[str, Any]:
        """The JSON-able arguments that make it again."""
        names = ("seed", "rank", "products", "long", "short", "law")
        return {name: getattr(self, name) for name in names} | {"check": check_numbers(self.seed)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """B (long, N r), column n r + k being column k of B_n, and A (r, short), fp32 on that device."""
        if device not in self._kept:
            B = self._entries(subseed(self.seed, 1), self.long, self.products * self.rank)
            A = self._entries(subseed(self.seed, 0), self.rank, self.short)
            self._kept[device] = B.to(device), A.to(device)
        return self._kept[device]

    @property
    def nbytes(self) -> int:
        """Bytes kept at the moment, on all devices."""
        return sum(t.nbytes for pair in self._kept.values() for t in pair)

    def _entries(self, seed: int, rows: int, columns: int) -> Tensor:
        if self.law == "uniform":
            entries = symmetric(seed, columns, (0, rows))
        else:
            half = 0.5 / (3 if self.law == "sparse" else self.short**0.5)
            u = uniform(seed, columns, (0, rows))
            entries = (u > 1 - half).float() - (u < half).float()
        return entries / entries.double().std().float()  # fp64: the same bits whatever the order of summation

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}
