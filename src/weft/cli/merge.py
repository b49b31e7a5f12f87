"""`weft merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.answer import print_facts, print_json, work
from weft.cli.options import Device, Dtype, Json, Model, Out, Seed, TrustRemoteCode

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's directory (weft's or PEFT's), put on first.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Split the weights into files of at most this.")] = "5GB",
    seed: Seed = 0,
    json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Collapse every sum of terms to one matrix: a plain model that anything reads."""
    arguments = locals()
    for name in ("json", "seed"):  # the seed is accepted as by every verb; nothing here is random
        del arguments[name]
    result = work("merge", **arguments)
    print_json(result) if json else print_facts(result)
