"""`weft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.answer import print_json, print_table, work
from weft.cli.options import Device, Json, Seed

__all__ = ["command"]


def command(
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory to write everything under.")] = Path("demo"),
    seed: Seed = 0,
    json: Json = False,
    device: Device = None,
) -> None:
    """The main job on the embedded model: inspect, compress, recover, evaluate, reload in a new process."""
    result = work("demo", out=out, seed=seed, device=device)
    if json:
        print_json(result)
        return
    columns = {"": "left"} | dict.fromkeys(("perplexity", "parameters", "bytes", "tokens / s"), "right")
    keys = ("perplexity", "parameters", "bytes", "tokens_per_second")
    print_table(columns, [[stage["name"], *(stage[k] for k in keys)] for stage in result["stages"]])
    print_table(
        {"": "left", " ": "left"}, [("continued by a new process", result["generated"]), ("report", result["report"])]
    )
