"""`weft compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Loading
from weft.cli.options import Bos, Embeddings, Layers, MethodOptions, Model, Out, Window, method_names

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            help="A method that compresses or quantizes; see weft methods.",
            autocompletion=method_names("compress", "quantize", "prune"),
        ),
    ] = "kfac-svd",
    then: Annotated[
        str | None,
        typer.Option(help="A method for what the first one lost, such as eora: --method nf3 --then eora."),
    ] = None,
    then_option: Annotated[
        list[str] | None,
        typer.Option(
            "--then-option",
            help="A hyperparameter of --then's method, as NAME=VALUE; again for more.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What is kept: a share of the matrices (0.6, 60%), '3.5 bits' a weight, or a size of the model "
            "(500MB); 0.6, or what a method of one size takes.",
            show_default=False,
        ),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="uniform, equal, energy, welore, asvd, best, lems, lems-search, modegpt, lrp-pruning, llama-nas, "
            "quantune, or a file; the method's own.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; Python's own sources.", show_default=False)
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows to calibrate on.")] = 32,
    window: Window = 512,
    bos: Bos = None,
    round: Annotated[int, typer.Option(help="Make every rank a multiple of this (8, 16, 64: fast on GPUs).")] = 1,
    layers: Layers = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--one-shot",
            help="Recalibrate on the layers already compressed; as published.",
            show_default=False,
        ),
    ] = None,
    by_block: Annotated[
        bool | None,
        typer.Option(
            "--by-block/--at-once",
            help="Hold one block's statistics at a time, or all of them; by default as many as take the model's bytes.",
            show_default=False,
        ),
    ] = None,
    embeddings: Embeddings = None,
    report: Annotated[
        Path | None,
        typer.Option(help="A page (.html) of what was chosen, and why.", show_default=False),
    ] = None,
    option: MethodOptions = None,
    **common: Unpack[Loading],
) -> None:
    """Compress a model into a directory that transformers opens after `import weft`."""
    answer("compress", locals())
