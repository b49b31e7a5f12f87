"""`weft finetune`."""

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
    method: Annotated[str, typer.Option(help="welore (low-rank components only), lora or full.")] = "welore",
    data: Annotated[
        Path | None, typer.Option(help="Text, JSONL or a datasets directory; Python's own sources.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    rank: Annotated[int, typer.Option(help="Rank of the adapters, for lora.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    window: Window = 512,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 4,
    seed: Seed = 0,
    json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train what a method trains: low-rank components, LoRA adapters, or everything."""
    result = work(
        "finetune",
        model=model,
        out=out,
        method=method,
        data=data,
        steps=steps,
        rank=rank,
        lr=lr,
        window=window,
        batch=batch,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    print_json(result) if json else print_facts(result)
