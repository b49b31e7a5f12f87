"""`weft pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Computing
from weft.cli.options import (
    Bos,
    DryRun,
    EarlyStopping,
    LoadBest,
    LogEvery,
    MethodOptions,
    OptimizerOptions,
    OutUnlessPlanned,
    ReportTo,
    SaveTotalLimit,
    Window,
    method_names,
)

__all__ = ["command"]


def command(
    out: OutUnlessPlanned = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of a fresh model: 9m (taken if none), 35m, 60m, 130m, 350m, 1b, 7b.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Go on with this model instead.", show_default=False),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="What stands in the place of the matrices: low-rank, sltrain ...; see weft methods.",
            autocompletion=method_names("pretrain"),
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw, galore, fira, frugal, apollo, dct_adamw, sinkgd ...")
    ] = "adamw",
    rank: Annotated[
        float | None,
        typer.Option(
            help="With --method, of its factors; a quarter of the width. Else of the optimizer's subspace, or its "
            "share of a side; the published one.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text, JSONL or Parquet, or directories; Python's own sources.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; the optimizer's published one, --from a tenth of it.", show_default=False
        ),
    ] = None,
    window: Window = 256,
    batch: Annotated[int, typer.Option(help="Windows that a process handles at once.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    warmup: Annotated[
        int | None, typer.Option(help="Steps over which the rate rises; a tenth of all.", show_default=False)
    ] = None,
    schedule: Annotated[str, typer.Option(help="How it falls: cosine (to a tenth), wsd or constant.")] = "cosine",
    restart: Annotated[int, typer.Option(help="Steps of warm-up after each new subspace or reset of moments.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled, on the blocks' matrices.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for no limit.")] = 0.0,
    lean: Annotated[bool, typer.Option(help="Keep fewer activations and no logits; the same gradients.")] = True,
    low_rank: Annotated[
        int | None, typer.Option(help="Short for --method low-rank of this rank.", show_default=False)
    ] = None,
    refactorise: Annotated[
        int | None, typer.Option(help="Re-balance those factors every so many steps.", show_default=False)
    ] = None,
    reset_moments: Annotated[
        int | None, typer.Option(help="Reset the optimizer's moments every so many steps.", show_default=False)
    ] = None,
    mup: Annotated[
        int | None, typer.Option(help="Scale rates from a base model of this width (muP).", show_default=False)
    ] = None,
    decay: Annotated[str, typer.Option(help="Weight decay by width, with --mup: sqrt, independent, fixed.")] = "sqrt",
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread weights, gradients and optimizer state over the processes (FSDP2).")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A model whose tokenizer a fresh one takes; that of pico.", show_default=False),
    ] = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option(help="Held-out text; Python's held-out sources, or none with --from.", show_default=False),
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(help="On how many windows of it; all.", show_default=False)
    ] = None,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(help="Text held out, read as --text: log its loss while training.", show_default=False),
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="And every so many steps.", show_default=False)] = None,
    load_best: LoadBest = False,
    early_stopping: EarlyStopping = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; a tenth of all.", show_default=False)
    ] = None,
    save_total_limit: SaveTotalLimit = 2,
    log_every: LogEvery = 10,
    report_to: ReportTo = "none",
    dry_run: DryRun = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing; say what a step would hold in memory, by parts.")
    ] = False,
    option: MethodOptions = None,
    optimizer_option: OptimizerOptions = None,
    bos: Bos = None,
    **common: Unpack[Computing],
) -> None:
    """Train a model from scratch, or further, with any optimizer, its matrices as they are or in a structure."""
    answer("pretrain", locals())
