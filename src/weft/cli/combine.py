"""`weft combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Answering
from weft.cli.options import MethodOptions, Out

__all__ = ["command"]


def command(
    adapters: Annotated[
        list[Path], typer.Argument(help="Directories of adapters of one base, weft's or PEFT's.", show_default=False)
    ],
    out: Out,
    method: Annotated[
        str, typer.Option(help="linear (the exact sum), cat (its factors side by side), svd or lego.")
    ] = "linear",
    rank: Annotated[
        int | None, typer.Option(help="Of the result, for svd and lego; the adapters' own.", show_default=False)
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Of the first adapter; again for each further one; 1.", show_default=False),
    ] = None,
    option: MethodOptions = None,
    **common: Unpack[Answering],
) -> None:
    """Make one low-rank adapter of several, without the base model."""
    answer("combine", locals())
