"""ColumnCode: integers whose width differs from column to column, on one range a row.

    T[i, j] = (code[i, j] - zero_i(b_j)) * scale_i(b_j),   b_j of 0 to 8 bits: that of column j; 0 for a column of zeros
    scale_i(b) = (high_i - low_i) / (2^b - 1),   zero_i(b) = round(-low_i / scale_i(b)),   low_i <= 0 <= high_i

Stored are the codes as one stream of bits, column width after column width, 4 bits a column for b, and two 16-bit
numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from weft.errors import WeftError
from weft.kernels.bit_packing import pack, packed_size, unpack
from weft.kernels.bits import numbers_of
from weft.kernels.integer_grid import of_range, to_codes
from weft.terms.base import Spec
from weft.terms.quantized import Quantized

__all__ = ["ColumnCode"]

MOST = 8


class ColumnCode(Quantized):
    """T[i, j] = (code - zero) * scale, of the width of column j and the range of row i.

    Args:
        counts: how many columns have 0, 1, ... 8 bits.
        scale_dtype: that ranges are stored in, "float16" or "bfloat16".

    Raises:
        WeftError: the counts are not those of `in_features` columns.
    """

    kind = "column_code"
    codes: Tensor  # uint8, a stream of bits
    widths: Tensor  # uint8, packed
    ranges: Tensor  # uint8 (out, 4): the bits of low and high, which a cast of the model must not round

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        counts: Sequence[int],
        scale_dtype: str = "float16",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        if len(counts) != MOST + 1 or min(counts) < 0 or sum(counts) != in_features:
            raise WeftError(f"The counts {list(counts)} are not those of {in_features} columns of 0 to {MOST} bits.")
        self.counts, self.scale_dtype = list(counts), scale_dtype
        stream = packed_size(out_features * sum(bits * count for bits, count in enumerate(counts)), 1)
        for name, size in (
            ("codes", (stream,)),
            ("widths", (packed_size(in_features, 4),)),
            ("ranges", (out_features, 4)),
        ):
            self.register_buffer(name, torch.empty(size, device=device, dtype=torch.uint8))

    @classmethod
    def from_codes(
        cls, codes: Tensor, widths: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype | None = None
    ) -> ColumnCode:
        """Of known codes (out, in), widths (in,) in bits, and ranges (out,) in the dtype to be stored; `dtype` is the
        one that `dense` gives.
        """
        counts = torch.bincount(widths.long(), minlength=MOST + 1).tolist()
        names: dict[str, Any] = {"counts": counts, "scale_dtype": str(low.dtype).removeprefix("torch.")}
        term = cls(codes.shape[1], codes.shape[0], device=codes.device, dtype=dtype, **names)
        ordered = codes.to(torch.uint8)[:, torch.argsort(widths, stable=True)]
        bits = [_as_bits(ordered[:, part].flatten(), b) for b, part in term._parts()]
        term.codes = pack(torch.cat(bits), 1)
        term.widths = pack(widths.to(torch.uint8), 4)
        term.ranges = torch.stack([low, high], 1).contiguous().view(torch.uint8)
        return term

    @classmethod
    def from_matrix(cls, matrix: Tensor, widths: Tensor, *, scale_dtype: torch.dtype = torch.float16) -> ColumnCode:
        """The nearest codes of `matrix` (out, in), on the ranges of its rows."""
        wide = matrix.detach().float()
        low, high = (t.to(scale_dtype) for t in (wide.amin(1).clamp(max=0), wide.amax(1).clamp(min=0)))
        codes = torch.zeros_like(wide)
        for bits in range(1, MOST + 1):
            grid = of_range(low.float().unsqueeze(1), high.float().unsqueeze(1), bits)
            codes[:, widths == bits] = to_codes(wide[:, widths == bits], grid)
        return cls.from_codes(codes, widths, low, high, matrix.dtype)

    @classmethod
    def example(cls, generator: Generator) -> ColumnCode:
        """One with several widths, and a column of none."""
        return cls.from_matrix(torch.randn(12, 8, generator=generator), torch.tensor([3, 0, 8, 2, 3, 2, 5, 1]))

    def column_widths(self) -> Tensor:
        """b (in,) uint8."""
        return unpack(self.widths, 4, self.in_features)

    def row_ranges(self) -> tuple[Tensor, Tensor]:
        """low and high (out, 1), in fp32."""
        ends = numbers_of(self.ranges, getattr(torch, self.scale_dtype)).float()
        return ends[:, :1], ends[:, 1:]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        low, high = self.row_ranges()
        total = sum(bits * count for bits, count in enumerate(self.counts))
        stream = unpack(self.codes, 1, self.out_features * total)
        found, start = [low.new_zeros(self.out_features, self.counts[0])], 0
        for bits, part in self._parts():
            size = self.out_features * (part.stop - part.start) * bits
            codes = _from_bits(stream[start : start + size], bits).view(self.out_features, -1)
            found.append(of_range(low, high, bits).values(codes))
            start += size
        order = torch.argsort(self.column_widths(), stable=True)
        return torch.cat(found, 1)[:, torch.argsort(order)].to(dtype or self.carrier.dtype)

    def spec(self) -> Spec:
        return super().spec() | {"counts": self.counts, "scale_dtype": self.scale_dtype}

    def _parts(self) -> Iterator[tuple[int, slice]]:
        """Each width but 0 that columns have, with its place among the columns ordered by width."""
        start = self.counts[0]
        for bits, count in enumerate(self.counts[1:], 1):
            if count:
                yield bits, slice(start, start + count)
            start += count


def _as_bits(codes: Tensor, bits: int) -> Tensor:
    """(n,) uint8 -> (n * bits,), the most significant first."""
    shifts = torch.arange(bits - 1, -1, -1, device=codes.device, dtype=torch.uint8)
    return ((codes.unsqueeze(1) >> shifts) & 1).flatten()


def _from_bits(stream: Tensor, bits: int) -> Tensor:
    """The inverse of `_as_bits`, in fp32."""
    places = 2.0 ** torch.arange(bits - 1, -1, -1, device=stream.device)
    return (stream.view(-1, bits) * places).sum(1)
