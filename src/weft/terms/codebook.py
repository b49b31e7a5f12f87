"""Codebook: codes that stand for the numbers of a table, one table for several rows.

    T[i, j] = books[g(i), code[i, j]],   books (G, 2^b);   with a group, times scale[i, j // group]

Stored are b bits a weight, 16 a number of the tables, 16 a scale, and for each row as many bits as tell which table is
its own: none where there is one table, or one a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from weft.errors import WeftError
from weft.kernels.bit_packing import looked_up, pack, packed_size, unpack
from weft.kernels.bits import numbers_of, product
from weft.kernels.codebooks import kmeans, nearest
from weft.kernels.coded_product import Coded
from weft.kernels.integer_grid import grouped, ungrouped
from weft.terms.base import Spec
from weft.terms.quantized import Quantized

__all__ = ["Codebook"]


class Codebook(Quantized):
    """T[i, j] = books[g(i), code].

    Args:
        bits: of a code, 1 to 8.
        tables: how many; 1 for all rows, or one a row, or any number in between, at most 256.
        table_dtype: that tables and scales are stored in: "float16", "bfloat16" or "float32".
        group: inputs of a row that share a scale, a row's last ones perhaps fewer; None where there are no scales.

    Raises:
        WeftError: another width, number of tables or group.
    """

    kind = "codebook"
    codes: Tensor  # uint8, packed, row after row
    books: Tensor  # uint8 (tables, 2^bits * bytes of a number): a cast of the model must not round them
    owners: Tensor | None  # uint8, packed: the table of each row
    scales: Tensor | None  # uint8 (out, groups * bytes of a number)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        tables: int = 1,
        table_dtype: str = "float16",
        group: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        if bits not in range(1, 9):
            raise WeftError(f"There are no codebooks of {bits} bits; give 1 to 8.")
        if tables != out_features and tables not in range(1, min(out_features, 257)):
            raise WeftError(f"{tables} tables are none for {out_features} rows; give 1 to 256, or one a row.")
        if group is not None and group < 1:
            raise WeftError(f"A group of {group} inputs is none; give 1 or more, or None for no scales.")
        self.bits, self.tables, self.table_dtype, self.group = bits, tables, table_dtype, group
        self.owner_bits = 0 if tables in (1, out_features) else (tables - 1).bit_length()
        itemsize = getattr(torch, table_dtype).itemsize
        sizes: dict[str, tuple[int, ...]] = {
            "codes": (packed_size(out_features * in_features, bits),),
            "books": (tables, 2**bits * itemsize),
            "owners": (packed_size(out_features, self.owner_bits or 1),),
            "scales": (out_features, -(-in_features // (group or in_features)) * itemsize),
        }
        for name, size in sizes.items():
            absent = (name == "owners" and not self.owner_bits) or (name == "scales" and group is None)
            self.register_buffer(name, None if absent else torch.empty(size, device=device, dtype=torch.uint8))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        books: Tensor,
        owners: Tensor | None = None,
        dtype: torch.dtype | None = None,
        scale: Tensor | None = None,
        group: int | None = None,
    ) -> Codebook:
        """Of known codes (out, in), tables (tables, 2^bits) in the dtype to be stored, and the table of each row
        (out,), or None for one of all or one a row; scales (out, groups) in that dtype where groups of inputs have
        some; `dtype` is the one that `dense` gives.
        """
        names: dict[str, Any] = {"bits": (books.shape[1] - 1).bit_length(), "tables": len(books), "group": group}
        names["table_dtype"] = str(books.dtype).removeprefix("torch.")
        term = cls(codes.shape[1], codes.shape[0], **names, device=codes.device, dtype=dtype)
        term.codes = pack(codes.to(torch.uint8).flatten(), term.bits)
        term.books = books.detach().contiguous().view(torch.uint8)
        if term.owner_bits:
            assert owners is not None
            term.owners = pack(owners.to(torch.uint8), term.owner_bits)
        if group is not None:
            assert scale is not None
            term.scales = scale.detach().contiguous().view(torch.uint8)
        return term

    @classmethod
    def example(cls, generator: Generator) -> Codebook:
        """One with 3 bits, 3 tables and a short last group."""
        matrix, owners = torch.randn(12, 8, generator=generator), torch.arange(12) % 3
        groups = grouped(matrix, 3)
        scale = groups.abs().amax(2).half()
        units = ungrouped(groups / scale.unsqueeze(2), 8)
        books = kmeans(torch.stack([units[owners == g].flatten() for g in range(3)]), torch.ones(1, 1), 8)
        return cls.from_codes(nearest(units, books[owners]), books.half(), owners, matrix.dtype, scale, 3)

    def table_codes(self) -> Tensor:
        """The codes (out, in) uint8."""
        return unpack(self.codes, self.bits, self.out_features * self.in_features).view(self.out_features, -1)

    def row_tables(self) -> Tensor:
        """The table of each row: (1 or out, 2^bits), fp32."""
        books = numbers_of(self.books, getattr(torch, self.table_dtype)).float()
        if self.owners is None:
            return books
        return books[unpack(self.owners, self.owner_bits, self.out_features).long()]

    def scale_matrix(self) -> Tensor | None:
        """The scales (out, groups) in the dtype that they are stored in."""
        return None if self.scales is None else numbers_of(self.scales, getattr(torch, self.table_dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        wanted, scale = dtype or self.carrier.dtype, self.scale_matrix()
        if scale is None or self.group is None:
            return self._levels(wanted)
        units = grouped(self._levels(torch.float32), self.group)
        return ungrouped(product(units, scale.float().unsqueeze(2), wanted), self.in_features)

    def _levels(self, dtype: torch.dtype) -> Tensor:
        """What stands in the tables, before any scale: (out, in)."""
        tables = self.row_tables().to(dtype)
        if len(tables) > 1:
            return tables.gather(1, self.table_codes().long())
        count = self.out_features * self.in_features
        return looked_up(self.codes, self.bits, count, tables[0]).view(self.out_features, -1)

    def coded(self) -> Coded | None:
        scale = self.scale_matrix()
        if scale is None or self.group is None or self.tables > 1:
            return None
        return Coded(self.codes, scale, self.bits, self.group, levels=self.row_tables()[0])

    def spec(self) -> Spec:
        own = {"bits": self.bits, "tables": self.tables, "table_dtype": self.table_dtype, "group": self.group}
        return super().spec() | own
