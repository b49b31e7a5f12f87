"""Pre-train a model from scratch: a size, a text, an optimizer.

The text is tokenised in the background and packed (`weft.train.stream`), the loop is transformers' Trainer, and the
optimizer one of `weft.optim.OPTIMIZERS`, or "adamw".
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from weft.embedded.text import calibration_files, default_text
from weft.errors import WeftError, unknown
from weft.io.save import save_model
from weft.optim import OPTIMIZERS, schedules
from weft.optim.mup import mup_groups, scale_init_
from weft.optim.parameters import split_parameters
from weft.rules.refactorise import Refactorise
from weft.rules.reset_moments import ResetMoments
from weft.train.recipe import Recipe
from weft.train.sizes import configuration, factorised, fresh_model
from weft.train.sources import read_texts, source_files
from weft.train.stream import StreamedRows
from weft.train.trainer import METRICS_FILE, train
from weft.train.windows import evaluation_windows, token_stream
from weft.verbs.evaluate import evaluate, model_size, peak_memory, reset_peak_memory
from weft.verbs.finetune import training_device
from weft.verbs.loading import load_tokenizer, resolve_dtype
from weft.verbs.output import check_output, open_output
from weft.verbs.record import begin

__all__ = ["build", "pretrain", "run"]

ADAMW_LR = 1e-3
SCHEDULES = ("cosine", "wsd", "constant")
WITHOUT_BACKWARD = ("mezo",)


def build(
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    seed: int,
    *,
    low_rank: int | None = None,
    mup: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, nn.Module | None]:
    """A fresh model of a published size, and, for width scaling, its narrow base on the meta device.

    Args:
        low_rank: train factors of this rank in place of the blocks' matrices.
        mup: the width of the base model on which lr and weight decay were tuned; initial weights are scaled
            accordingly.
    """
    config = configuration(size, tokenizer, window)
    model = fresh_model(config, seed, dtype=dtype)
    base: nn.Module | None = None
    if mup is not None:
        if low_rank is not None:
            raise WeftError("--mup scales dense matrices: give it without --low-rank.")
        with torch.device("meta"):
            base = LlamaForCausalLM(configuration(size, tokenizer, window, width=mup))
        scale_init_(model, base)
    return (factorised(model, low_rank, seed) if low_rank is not None else model), base


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Path],
    recipe: Recipe,
    directory: Path,
    *,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    restart: int = 0,
    refactorise: int | None = None,
    reset_moments: int | None = None,
    base: nn.Module | None = None,
    decay: str = "sqrt",
    evaluation: str | Sequence[str] | None = None,
    eval_windows: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train `model` in place on the files' text, and return what was measured.

    Args:
        files: text, JSONL or Parquet files; each document ends with the end-of-text token.
        directory: for the token stream, checkpoints and metrics; training goes on from the last checkpoint in it.
        optimizer: "adamw" or a name of `weft.optim.OPTIMIZERS`; its options (rank, refresh, scale, projection ...) as
            `options`.
        schedule: "cosine" (to a tenth), "wsd" or "constant", after `recipe.warmup` steps of warm-up.
        restart: steps of warm-up after each refresh of the optimizer's subspace (or reset of its moments).
        refactorise: steps between two re-balancings of low-rank factors; reset_moments: between two resets of all
            moments.
        base: the narrow model of width scaling; decay: how weight decay scales with width
            (`weft.optim.mup.mup_groups`).
    """

    def measure() -> dict[str, Any]:
        if evaluation is None:
            return {}
        return {"perplexity": evaluate(model, tokenizer, evaluation, recipe.window, windows=eval_windows)["perplexity"]}

    made = make_optimizer(optimizer, model, recipe, base, decay, options)
    period = reset_moments or int(options.get("refresh", 200))
    plan = _schedule(schedule, recipe, restart, period)
    rules = [Refactorise(refactorise)] if refactorise else []
    rules += [ResetMoments(reset_moments, made)] if reset_moments else []
    device = next(model.parameters()).device
    reset_peak_memory(device)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    count = recipe.steps * recipe.batch * recipe.accumulate * processes
    began = time.perf_counter()
    with StreamedRows(files, tokenizer, recipe.window, count, recipe.seed, directory / f"tokens-{rank}.bin") as rows:
        log = train(
            model,
            rows,
            recipe,
            directory,
            optimizer=lambda: made,
            scheduler=lambda optim: LambdaLR(optim, plan),
            widen=False,
            rules=rules,
            measure=measure if evaluation is not None else None,
        )
        windows = min(rows.windows, count)
    losses = [line["loss"] for line in log if "loss" in line]
    return {
        "steps": recipe.steps,
        "parameters": model_size(model)[0],
        "tokens": count * recipe.window,
        "epochs": count / windows,
        "optimizer_bytes": state_bytes(made),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory(device),
        **measure(),
    }


def make_optimizer(
    name: str, model: nn.Module, recipe: Recipe, base: nn.Module | None, decay: str, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """AdamW, by width where a base model is given, or the named preset with its options."""
    if name == "adamw":
        if base is not None:
            groups = mup_groups(model, base, recipe.lr, weight_decay=recipe.weight_decay, decay=decay)  # type: ignore[arg-type]
        else:
            matrices, others = split_parameters(model)
            groups = [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=options.get("betas", (0.9, 0.999)))
    made: torch.optim.Optimizer = OPTIMIZERS[name](
        model, lr=recipe.lr, weight_decay=recipe.weight_decay, seed=recipe.seed, **options
    )
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    states = optimizer.state_dict()["state"].values()
    tensors = [value for state in states for value in _tensors(state)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    nested = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in nested for tensor in _tensors(item)]


def run(
    out: str | Path,
    *,
    size: str = "9m",
    optimizer: str = "adamw",
    rank: int | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    tokenizer: str = "pico",
    eval_text: str | Path | Sequence[str | Path] | None = None,
    eval_windows: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    schedule: str = "cosine",
    restart: int = 0,
    low_rank: int | None = None,
    refactorise: int | None = None,
    reset_moments: int | None = None,
    mup: int | None = None,
    decay: str = "sqrt",
    device: str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`weft pretrain`: make a model of `size`, train it on `text`, write a directory with `run.json` and
    `metrics.jsonl`.

    Args:
        rank: of the optimizer's subspace; None for its own default.
        text: files or directories; None for Python's own sources.
        tokenizer: a model whose tokenizer to take.
        eval_text: text whose perplexity is measured; None for Python's held-out sources.
        lr: None for the optimizer's published rate (1e-3 for AdamW). warmup: None for a tenth of the steps.
        **settings: fields of `Recipe` (steps, window, batch, seed ...), and options of the optimizer.

    Raises:
        WeftError: any argument that cannot work, before a model is made.
        KeyboardInterrupt: a signal came; the same call goes on from the last step to the same bits.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("settings", "device")} | settings
    recipe, options = _settings(optimizer, rank, lr, warmup, settings)
    _check(optimizer, options, schedule, recipe, refactorise, reset_moments, low_rank, mup, decay)
    check_output(out, arguments)
    files = source_files(text) if text is not None else calibration_files()
    evaluation = read_texts(eval_text) if eval_text is not None else [default_text("evaluation")]
    target = training_device(device)
    words = load_tokenizer(tokenizer)
    record = begin("pretrain", arguments | asdict(recipe), seed=recipe.seed, device=target)
    evaluation_windows(len(token_stream(words, evaluation)), recipe.window, count=eval_windows)
    numbers = resolve_dtype(dtype, target) or torch.bfloat16
    model, base = build(size, words, recipe.window, recipe.seed, low_rank=low_rank, mup=mup, dtype=numbers)
    model.to(target)  # type: ignore[arg-type]
    with open_output(out, arguments) as place:
        metrics = pretrain(
            model, words, files, recipe, place.progress, optimizer=optimizer, schedule=schedule, restart=restart,
            refactorise=refactorise, reset_moments=reset_moments, base=base, decay=decay, evaluation=evaluation,
            eval_windows=eval_windows, **options,
        )  # fmt: skip
        if int(os.environ.get("RANK", "0")) == 0:
            save_model(model, words, place.path, run=record.write(place.path, metrics))
            (place.path / METRICS_FILE).write_bytes((place.progress / METRICS_FILE).read_bytes())
    return {"output": str(out), **metrics}


def _settings(
    optimizer: str, rank: int | None, lr: float | None, warmup: int | None, settings: Mapping[str, Any]
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the optimizer's own rate, and what is left for the optimizer."""
    if optimizer != "adamw" and optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, ["adamw", *OPTIMIZERS])
    known = {field.name for field in fields(Recipe)}
    options = {key: value for key, value in settings.items() if key not in known}
    options |= {} if rank is None else {"rank": rank}
    recipe = {"window": 256, "batch": 16, "clip": 0.0} | {k: v for k, v in settings.items() if k in known}
    rate = ADAMW_LR if optimizer == "adamw" else inspect.signature(OPTIMIZERS[optimizer]).parameters["lr"].default
    steps = int(recipe.get("steps", Recipe.steps))
    return Recipe(
        **recipe, lr=lr if lr is not None else rate, warmup=steps // 10 if warmup is None else warmup
    ), options


def _check(
    optimizer: str,
    options: Mapping[str, Any],
    schedule: str,
    recipe: Recipe,
    refactorise: int | None,
    reset_moments: int | None,
    low_rank: int | None,
    mup: int | None,
    decay: str,
) -> None:
    if optimizer in WITHOUT_BACKWARD:
        raise WeftError(f"--optimizer {optimizer} trains without gradients, which cannot start from random weights.")
    if optimizer == "adamw" and options.get("rank") is not None:
        raise WeftError("--rank is the rank of an optimizer's subspace, and adamw has none; choose galore, fira ...")
    if schedule not in SCHEDULES:
        raise unknown("learning-rate schedule", schedule, SCHEDULES)
    for name, value in (("refactorise", refactorise), ("reset-moments", reset_moments)):
        if value is not None and value < 1:
            raise WeftError(f"--{name} is {value}: give the steps between two, at least 1.")
    if refactorise is not None and low_rank is None:
        raise WeftError("--refactorise re-balances low-rank factors: give --low-rank RANK too.")
    if mup is not None and optimizer != "adamw":
        raise WeftError(f"--mup sets learning rates by width for AdamW; --optimizer {optimizer} has groups of its own.")
    if decay not in ("sqrt", "independent", "fixed"):
        raise unknown("width rule of weight decay", decay, ("sqrt", "independent", "fixed"))


def _schedule(name: str, recipe: Recipe, restart: int, period: int) -> schedules.Schedule:
    plans = {
        "cosine": lambda: schedules.cosine(recipe.steps, recipe.warmup),
        "wsd": lambda: schedules.wsd(recipe.steps, recipe.warmup, recipe.steps // 5),
        "constant": lambda: schedules.constant(recipe.warmup),
    }
    plan = plans[name]()
    return schedules.restarted(plan, period, restart) if restart else plan
