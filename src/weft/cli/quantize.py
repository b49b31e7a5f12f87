"""`weft quantize`."""

from __future__ import annotations

from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Loading
from weft.cli.options import Embeddings, Model, Out

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    bits: Annotated[
        float | None,
        typer.Option(
            help="2, 3, 4 (the default) or 8; 2 to 8 for rtn; for lq-lora their mean, such as 2.75.", show_default=False
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="nf2 to nf8, int8, fp8, mxfp4 to mxfp8, rtn, or lq-lora: codes and a low-rank term for their error.",
            show_default=False,
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Only layers of this name or pattern, such as q_proj, or all but '!q_proj'; again for more.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the low-rank term, for lq-lora.")] = 64,
    embeddings: Embeddings = None,
    max_shard_size: Annotated[str, typer.Option(help="Split the weights into files of at most this.")] = "5GB",
    **common: Unpack[Loading],
) -> None:
    """Put codes of few bits in the place of a model's weights."""
    answer("quantize", locals(), unused=("seed",))  # taken as by every verb; nothing here is random
