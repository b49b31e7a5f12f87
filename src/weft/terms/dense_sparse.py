"""DenseSparse: T = S D, a small dictionary D of rows, and for each row of T a few of them, its own.

A rank-m product whose left factor has k numbers a row. Stored are D (m, in), the k numbers of each row (out, k), and
which rows of D they belong to, in as many bits as m asks for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from weft.kernels.bit_packing import pack, packed_size, unpack
from weft.terms.base import Spec, Term

__all__ = ["DenseSparse"]


class DenseSparse(Term):
    """T_i = sum_j values_ij D[places_ij], of k different rows of D for each i. The places are fixed.

    Args:
        atoms: m, the rows of D.
        nonzeros: k.
    """

    kind = "dense_sparse"

    def __init__(self, in_features: int, out_features: int, atoms: int, nonzeros: int, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.atoms, self.nonzeros = atoms, nonzeros
        self.D = nn.Parameter(torch.empty(atoms, in_features, **place))
        self.values = nn.Parameter(torch.empty(out_features, nonzeros, **place))
        size = self.place_bytes(out_features, atoms, nonzeros)
        self.register_buffer("bits", torch.empty(size, device=place.get("device"), dtype=torch.uint8))
        self.bits: Tensor

    @staticmethod
    def place_bytes(out_features: int, atoms: int, nonzeros: int) -> int:
        """Bytes of the places: ceil(log2 m) bits each."""
        low, high = _widths(atoms)
        return sum(packed_size(out_features * nonzeros, bits) for bits in (low, high) if bits)

    @classmethod
    def of(cls, D: Tensor, values: Tensor, places: Tensor) -> DenseSparse:
        """Of D (m, in), values (out, k), and places (out, k), different ones in each row."""
        term = cls(D.shape[1], len(values), len(D), values.shape[1], device=D.device, dtype=D.dtype)
        low, high = _widths(len(D))
        flat = places.flatten()
        parts = [pack((flat % 2**low).to(torch.uint8), low)]
        parts += [pack((flat // 2**low).to(torch.uint8), high)] if high else []
        with torch.no_grad():
            term.D.copy_(D)
            term.values.copy_(values)
            term.bits.copy_(torch.cat(parts))
        return term

    @classmethod
    def example(cls, generator: Generator) -> DenseSparse:
        """Two of five rows each."""
        D, values = torch.randn(5, 8, generator=generator), torch.randn(12, 2, generator=generator)
        return cls.of(D, values, torch.rand(12, 5, generator=generator).argsort(1)[:, :2])

    def places(self) -> Tensor:
        """(out, k) int64."""
        low, high = _widths(self.atoms)
        count = self.out_features * self.nonzeros
        size = packed_size(count, low)
        places = unpack(self.bits[:size], low, count).long()
        if high:
            places = places + unpack(self.bits[size:], high, count).long() * 2**low
        return places.view(self.out_features, self.nonzeros)

    def coefficients(self, dtype: torch.dtype | None = None) -> Tensor:
        """S (out, m)."""
        values = self.values.to(dtype or self.values.dtype)
        return values.new_zeros(self.out_features, self.atoms).scatter(1, self.places(), values)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.D.to(x.dtype)), self.coefficients(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.coefficients(dtype) @ self.D.to(dtype or self.D.dtype)

    def spec(self) -> Spec:
        return super().spec() | {"atoms": self.atoms, "nonzeros": self.nonzeros}


def _widths(atoms: int) -> tuple[int, int]:
    """Bits of a place, up to eight and beyond."""
    bits = max((atoms - 1).bit_length(), 1)
    return min(bits, 8), max(bits - 8, 0)
