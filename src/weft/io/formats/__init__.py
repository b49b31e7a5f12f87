"""Formats that servers and tools read: a file each, which ends in its `FORMAT`, and its line in the list below."""

from __future__ import annotations

from weft.errors import unknown
from weft.io.formats import compressed_tensors, gguf, gguf_lora, gptq, hf
from weft.io.formats.base import Coded, Export, Format, Stored, coded_layers

__all__ = ["FORMATS", "Coded", "Export", "Format", "Stored", "coded_layers", "find_format"]

FORMATS: dict[str, Format] = {
    page.FORMAT.name: page.FORMAT
    for page in (
        compressed_tensors,
        gptq,
        gguf,
        gguf_lora,
        hf,
    )
}
"""Every format by its name, in the order in which they are shown."""


def find_format(name: str) -> Format:
    """The format of that name. Raises WeftError with the nearest names."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]
