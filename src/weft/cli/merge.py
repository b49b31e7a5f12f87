"""`weft merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Loading
from weft.cli.options import Model, Out

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's directory (weft's or PEFT's), put on first.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Split the weights into files of at most this.")] = "5GB",
    **common: Unpack[Loading],
) -> None:
    """Collapse every sum of terms to one matrix: a plain model that anything reads."""
    answer("merge", locals(), unused=("seed",))  # taken as by every verb; nothing here is random
