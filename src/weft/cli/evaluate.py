"""`weft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import gathered, print_facts, print_json, print_table, work
from weft.cli.common import Loading
from weft.cli.options import Bos, Model, Window

__all__ = ["command"]


def command(
    model: Model,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="The text to judge by; again for more; held-out Python sources.", show_default=False),
    ] = None,
    window: Window = 512,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next; the window.", show_default=False)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows; all.", show_default=False)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead, names or files: a,b.yaml.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; all.", show_default=False)] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's directory (weft's or PEFT's), put on first.", show_default=False)
    ] = None,
    bos: Bos = None,
    **common: Unpack[Loading],
) -> None:
    """Measure perplexity, speed and size."""
    arguments, json = gathered(locals())
    arguments["tasks"] = None if tasks is None else [task for task in tasks.split(",") if task]
    result = work("evaluate", **arguments)
    if json or tasks is None:
        print_json(result) if json else print_facts(result)
        return
    rows = [(task, *measure) for task, found in result["tasks"].items() for measure in found.items()]
    print_table({"task": "left", "measure": "left", "": "right"}, rows)
