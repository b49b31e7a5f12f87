"""hf: a plain dense model of transformers, every sum of terms the matrix that it equals; what `weft merge` writes."""

from __future__ import annotations

from weft.io.formats.base import Format

__all__ = ["FORMAT"]

FORMAT = Format(
    name="hf",
    summary="A plain dense model.",
    holds="every sum of terms, as one dense matrix",
    reads="everything that reads transformers' directories",
)
