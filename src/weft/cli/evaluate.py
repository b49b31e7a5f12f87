"""`weft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.answer import print_facts, print_json, work
from weft.cli.options import Bos, Device, Dtype, Json, Model, Seed, TrustRemoteCode, Window

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
    bos: Bos = None,
    seed: Seed = 0,
    json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure perplexity, speed and size."""
    arguments = locals()
    del arguments["json"]
    result = work("evaluate", **arguments)
    print_json(result) if json else print_facts(result)
