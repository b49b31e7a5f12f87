"""`weft export`."""

from __future__ import annotations

from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Loading
from weft.cli.options import Model, Out

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    format: Annotated[
        str, typer.Option(help="compressed-tensors, gptq, gguf, gguf-lora, or hf: a plain dense model.")
    ] = "hf",
    **common: Unpack[Loading],
) -> None:
    """Write a model in a format that servers read, exactly, or say which layer cannot be."""
    answer("export", locals(), unused=("seed",))  # taken as by every verb; nothing here is random
