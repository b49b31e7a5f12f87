"""Masked: T has the numbers that a mask lets stand, and the mask in one bit an entry.

Stored are the kept numbers, row after row, and (out in) / 8 bytes: less than positions cost at all densities above 3 %.
An N:M pattern is a mask as any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.kernels.bit_packing import pack, packed_size, unpack
from weft.kernels.transient_linear import Summand
from weft.terms.base import Spec, Term

__all__ = ["Masked"]


class Masked(Term):
    """T[mask] = values, row-major; 0 elsewhere. The mask is fixed.

    Args:
        nonzeros: numbers kept.
    """

    kind = "masked"
    lean_alone = True
    entries = ("values",)

    def __init__(self, in_features: int, out_features: int, nonzeros: int, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.nonzeros = nonzeros
        self.values = nn.Parameter(torch.empty(nonzeros, **place))
        size = packed_size(out_features * in_features, 1)
        self.register_buffer("bits", torch.empty(size, device=place.get("device"), dtype=torch.uint8))
        self.bits: Tensor

    @classmethod
    def from_mask(cls, matrix: Tensor, mask: Tensor) -> Masked:
        """The entries of `matrix` (out, in) where the boolean `mask` (out, in) is true, zeros among them included."""
        values = matrix[mask]
        term = cls(matrix.shape[1], matrix.shape[0], values.numel(), device=matrix.device, dtype=matrix.dtype)
        with torch.no_grad():
            term.values.copy_(values)
            term.bits.copy_(pack(mask.to(torch.uint8).flatten(), 1))
        return term

    @classmethod
    def from_places(cls, matrix: Tensor, places: Tensor) -> Masked:
        """The entries of `matrix` (out, in) at flat places (k,), all different, in any order."""
        term = cls(matrix.shape[1], matrix.shape[0], places.numel(), device=matrix.device, dtype=matrix.dtype)
        mask = torch.zeros(matrix.numel(), dtype=torch.uint8, device=matrix.device).index_fill_(0, places, 1)
        with torch.no_grad():
            term.values.copy_(matrix.flatten()[places.sort().values])
            term.bits.copy_(pack(mask, 1))
        return term

    @classmethod
    def example(cls, generator: Generator) -> Masked:
        """One of about half the entries."""
        return cls.from_mask(torch.randn(12, 8, generator=generator), torch.rand(12, 8, generator=generator) < 0.5)

    def mask(self) -> Tensor:
        """(out, in) bool."""
        return unpack(self.bits, 1, self.out_features * self.in_features).view(self.out_features, -1).bool()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.values.to(dtype or self.values.dtype)
        empty = torch.zeros(self.out_features, self.in_features, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask(), values)

    def summand(self) -> Summand:
        return Summand(_add, _pull, 1.0, (self.values, self.bits))

    def spec(self) -> Spec:
        return super().spec() | {"nonzeros": self.nonzeros}


def _add(W: Tensor, scale: float, values: Tensor, bits: Tensor) -> None:
    mask = unpack(bits, 1, W.numel()).view(W.shape).bool()
    W.add_(torch.zeros_like(W).masked_scatter_(mask, values), alpha=scale)


def _pull(G: Tensor, scale: float, values: Tensor, bits: Tensor) -> tuple[Tensor, None]:
    # the count is known: a boolean index would wait for the device to say it
    positions = unpack(bits, 1, G.numel()).nonzero_static(size=values.numel()).squeeze(1)
    return G.view(-1).index_select(0, positions).mul_(scale), None
