"""`weft combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.answer import print_facts, print_json, work
from weft.cli.options import Json, MethodOptions, Out, Seed, method_options

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
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Make one low-rank adapter of several, without the base model."""
    arguments = locals()
    for name in ("json", "option"):
        del arguments[name]
    result = work("combine", **arguments, **method_options(option, arguments))
    print_json(result) if json else print_facts(result)
