"""`weft quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from weft.cli.answer import print_facts, print_json, work
from weft.cli.options import Device, Dtype, Json, Model, Out, Seed, TrustRemoteCode

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    bits: Annotated[
        float | None,
        typer.Option(help="2, 3, 4 (the default) or 8; for lq-lora their mean, such as 2.75.", show_default=False),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="nf2, nf3, nf4, nf8, int8, or lq-lora: codes and a low-rank term for their error.", show_default=False
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Only layers of this name or pattern, such as q_proj; again for more.", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the low-rank term, for lq-lora.")] = 64,
    max_shard_size: Annotated[str, typer.Option(help="Split the weights into files of at most this.")] = "5GB",
    seed: Seed = 0,
    json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Put codes of few bits in the place of a model's weights."""
    arguments = locals()
    for name in ("json", "seed"):  # the seed is accepted as by every verb; nothing here is random
        del arguments[name]
    result = work("quantize", **arguments)
    print_json(result) if json else print_facts(result)
