"""`weft finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import answer
from weft.cli.common import Loading
from weft.cli.options import (
    Bos,
    DryRun,
    EarlyStopping,
    LoadBest,
    LogEvery,
    MethodOptions,
    Model,
    OptimizerOptions,
    Out,
    ReportTo,
    SaveTotalLimit,
    Window,
    method_names,
)

__all__ = ["command"]

_Field = Annotated[str | None, typer.Option(help="The field of a record that holds it.", show_default=False)]


def command(
    model: Model,
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            help="welore (low-rank components only), lora, full ...; see weft methods.", autocompletion=method_names()
        ),
    ] = "welore",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, JSONL, Parquet or a datasets folder; again for more; Python's own sources.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    rank: Annotated[
        int | None,
        typer.Option(help="Rank of adapters (16), or of the optimizer's subspace (its own).", show_default=False),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that get an adapter, such as q_proj or '*.0.*', or all but '!up_proj'; again for more; all.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    window: Window = 512,
    batch: Annotated[int, typer.Option(help="Windows that a process handles at once.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 0,
    schedule: Annotated[str, typer.Option(help="How it falls: cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Decoupled, on matrices only.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for no limit.")] = 1.0,
    optimizer: Annotated[str | None, typer.Option(help="The method's own, or AdamW.", show_default=False)] = None,
    lean: Annotated[bool, typer.Option(help="Keep fewer activations and no logits; the same gradients.")] = True,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations: less memory, more time.")
    ] = False,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; a tenth of all.", show_default=False)
    ] = None,
    eval_text: Annotated[
        list[Path] | None, typer.Option(help="Measure perplexity on this before and after.", show_default=False)
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(help="On how many windows of it; all.", show_default=False)
    ] = None,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(help="Data held out, read as --data: log its loss while training.", show_default=False),
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate every so many steps.", show_default=False)] = None,
    load_best: LoadBest = False,
    early_stopping: EarlyStopping = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Learn this model's predictions, not the labels: the dense model of a compressed one.",
            show_default=False,
        ),
    ] = None,
    teacher_top: Annotated[
        int | None,
        typer.Option(help="Take its so many most likely tokens by themselves; all alike.", show_default=False),
    ] = None,
    teacher_labels: Annotated[
        float | None,
        typer.Option(help="Weight of the labels' own loss beside it; the method's, mostly 0.", show_default=False),
    ] = None,
    teacher_features: Annotated[
        float | None,
        typer.Option(help="Weight of the error of the states after each block, such as 1.", show_default=False),
    ] = None,
    save_total_limit: SaveTotalLimit = 2,
    log_every: LogEvery = 10,
    report_to: ReportTo = "none",
    dry_run: DryRun = False,
    split: Annotated[str, typer.Option(help="Which part of a datasets folder.")] = "train",
    text_field: _Field = None,
    prompt_field: _Field = None,
    completion_field: _Field = None,
    messages_field: _Field = None,
    skip_bad: Annotated[int, typer.Option(help="Leave out up to so many records that cannot be read.")] = 0,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapter into the model and write that instead.")
    ] = False,
    option: MethodOptions = None,
    optimizer_option: OptimizerOptions = None,
    bos: Bos = None,
    **common: Unpack[Loading],
) -> None:
    """Train what a method trains: low-rank components, adapters, or everything."""
    answer("finetune", locals())
