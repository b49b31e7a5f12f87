"""`weft compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.answer import print_facts, print_json, work
from weft.cli.options import Device, Dtype, Json, Model, Out, Seed, TrustRemoteCode, Window

__all__ = ["command"]


def command(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help="A method that compresses; see `weft methods`.")] = "kfac-svd",
    budget: Annotated[
        str, typer.Option(help="What is kept: a share (0.6, 60%) or a size (500MB) of the linear layers.")
    ] = "0.6",
    allocate: Annotated[
        str | None, typer.Option(help="uniform, energy, welore, asvd, best, or an allocation file; the method's own.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; Python's own sources.", show_default=False)
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows to calibrate on.")] = 32,
    window: Window = 512,
    round: Annotated[int, typer.Option(help="Make every rank a multiple of this (8, 16, 64: fast on GPUs).")] = 1,
    seed: Seed = 0,
    json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compress a model into a directory that transformers opens after `import weft`."""
    result = work(
        "compress",
        model=model,
        out=out,
        method=method,
        budget=budget,
        allocate=allocate,
        calibration=calibration,
        windows=windows,
        window=window,
        round=round,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    print_json(result) if json else print_facts(result)
