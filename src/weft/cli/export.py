"""`weft export`."""

from __future__ import annotations

from typing import Annotated

import typer

from weft.cli.answer import print_facts, print_json, work
from weft.cli.options import Device, Dtype, Json, Model, Out, Seed, TrustRemoteCode

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    format: Annotated[
        str, typer.Option(help="compressed-tensors, gptq, gguf, or hf (a plain dense model).", show_default=True)
    ] = "hf",
    seed: Seed = 0,
    json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model in a format that servers read, exactly, or say which layer cannot be."""
    arguments = locals()
    for name in ("json", "seed"):  # the seed is accepted as by every verb; nothing here is random
        del arguments[name]
    result = work("export", **arguments)
    print_json(result) if json else print_facts(result)
