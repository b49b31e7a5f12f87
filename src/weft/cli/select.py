"""`weft select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Computing
from weft.cli.options import MethodOptions, TrustRemoteCode, Window, method_names

__all__ = ["command"]


def command(
    data: Annotated[
        Path, typer.Argument(help="Records to choose among: .jsonl, .csv, .parquet ...", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .jsonl file to write.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A model whose last states embed the texts; a directory, a Hub id, or 'pico'.")
    ] = "pico",
    method: Annotated[
        str,
        typer.Option(help="rds-plus, data-pruning ...; see weft methods.", autocompletion=method_names("select")),
    ] = "rds-plus",
    keep: Annotated[str, typer.Option(help="A share or a number of records.")] = "20%",
    query: Annotated[
        Path | None, typer.Option(help="Examples of what the data is for, for rds-plus.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write a page of what was kept and what not.", show_default=False)
    ] = None,
    window: Window = 512,
    batch: Annotated[int, typer.Option(help="Texts that are embedded at once.")] = 8,
    option: MethodOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    **common: Unpack[Computing],
) -> None:
    """Choose training data: what is near a task, or far from what is common; repeats are counted."""
    answer("select", locals())
