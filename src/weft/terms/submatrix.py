"""Submatrix: T is zero outside of some rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.terms.base import Spec, Term

__all__ = ["Submatrix", "select"]


def select(W: Tensor, rows: Sequence[int] | Tensor | None, columns: Sequence[int] | Tensor | None) -> Tensor:
    """These rows and columns of W (out, in), in own memory; None takes all of them."""
    W = W if rows is None else W[torch.as_tensor(rows, device=W.device).long()]
    W = W if columns is None else W[:, torch.as_tensor(columns, device=W.device).long()]
    return W.contiguous()


class Submatrix(Term):
    """T[R][:, C] = M (|R|, |C|), all else zero; R and C are fixed, distinct, and None where all are meant.

    The product is that of M, so that it is smaller in numbers and in multiplications; x and y keep their width: what
    reads y finds zeros at the rows that are gone. The places are stored as 32-bit integers, and counted.

    Args:
        rows, columns: how many there are; None for all.
    """

    kind = "submatrix"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rows: int | None = None,
        columns: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        shape = (out_features if rows is None else rows, in_features if columns is None else columns)
        self.M = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        for name, count in (("rows", rows), ("columns", columns)):
            places = None if count is None else torch.empty(count, device=device, dtype=torch.int32)
            self.register_buffer(name, places)
        self.rows: Tensor | None
        self.columns: Tensor | None

    @classmethod
    def of(
        cls, M: Tensor, shape: tuple[int, int], rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Submatrix:
        """The (out, in) term of a given M at these rows and columns."""
        counts = [None if places is None else len(places) for places in (rows, columns)]
        term = cls(shape[1], shape[0], *counts, device="meta", dtype=M.dtype)
        term.M = nn.Parameter(M.detach().contiguous())
        term.rows, term.columns = (
            None if places is None else places.to(M.device, torch.int32) for places in (rows, columns)
        )
        return term

    @classmethod
    def example(cls, generator: torch.Generator) -> Submatrix:
        """A small one of random numbers."""
        M = torch.randn(4, 5, generator=generator)
        return cls.of(M, (12, 8), torch.tensor([0, 3, 4, 11]), torch.tensor([1, 2, 5, 6, 7]))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.columns is None else x.index_select(-1, self.columns)
        y = F.linear(x, self.M.to(x.dtype))
        if self.rows is None:
            return y
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.rows.long(), y)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        M = self.M.to(dtype or self.M.dtype)
        if self.columns is not None:
            M = M.new_zeros(len(M), self.in_features).index_copy(1, self.columns.long(), M)
        if self.rows is not None:
            M = M.new_zeros(self.out_features, self.in_features).index_copy(0, self.rows.long(), M)
        return M

    def spec(self) -> Spec:
        counts = {"rows": self.rows, "columns": self.columns}
        return super().spec() | {name: None if places is None else len(places) for name, places in counts.items()}
