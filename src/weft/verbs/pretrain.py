"""Pre-train a model, from scratch or further: a text, an optimizer, and what stands in the place of its matrices.

The text is tokenised in the background and packed (`weft.train.stream`), the loop is transformers' Trainer, and the
optimizer one of `weft.optim.OPTIMIZERS`, or "adamw".
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.embedded.text import calibration_files
from weft.errors import WeftError, unknown
from weft.io.quantizer import sum_specs
from weft.io.save import save_model
from weft.methods import Method
from weft.plan.step import planned
from weft.plan.supposed import Supposed
from weft.rules import Rules
from weft.rules.schedule import in_time
from weft.runs.inputs import contents
from weft.runs.loading import load_tokenizer, resolve_dtype
from weft.runs.output import Workplace, check_output, keep_logs, open_output
from weft.runs.record import Run, begin
from weft.terms.coverage import coverage
from weft.train.metrics import OneStep
from weft.train.optimizers import (
    check_options,
    chosen_options,
    default_options,
    default_rate,
    find_optimizer,
    make_optimizer,
)
from weft.train.recipe import Recipe
from weft.train.sharding import asked_to_shard, rows_a_step
from weft.train.sources import read_texts, source_files
from weft.verbs.beginning import build, check_beginning, check_held_out, emptied, given_model, held_out
from weft.verbs.figures import rehearsed
from weft.verbs.finetune import check_judging, training_device
from weft.verbs.fresh import Structure
from weft.verbs.pace import period_of, schedule_of
from weft.verbs.pretraining import pretrain, rules_of

__all__ = ["build", "pretrain", "run"]


GOING_ON = 0.1
"""Of an optimizer's rate for fresh weights, where a model is given: the whole of it undoes what was learned."""
ASIDE = ("settings", "device", "dry_run", "plan", "shard")
"""Arguments that decide nothing of what is written."""


def run(
    out: str | Path | None = None,
    *,
    size: str | None = None,
    model: str | None = None,
    method: str | Method | None = None,
    optimizer: str = "adamw",
    optimizer_options: Mapping[str, Any] | None = None,
    rank: float | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    tokenizer: str | None = None,
    eval_text: str | Path | Sequence[str | Path] | None = None,
    eval_windows: int | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    schedule: str = "cosine",
    restart: int = 0,
    low_rank: int | None = None,
    refactorise: int | None = None,
    reset_moments: int | None = None,
    mup: int | None = None,
    decay: str = "sqrt",
    shard: bool = False,
    dry_run: bool = False,
    plan: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`weft pretrain`: make a model of `size`, or take one, train it on `text`, write a directory with `run.json` and
    `metrics.jsonl`.

    Args:
        size: of a fresh model; "9m" where neither size nor model is given.
        model: a directory, Hub id or embedded name: the model to go on with instead (`--from`).
        method: of kind "pretrain": what stands in the place of the blocks' matrices; None for the matrices themselves.
        rank: with a method, of what stands there (None for a quarter of the width). Without one, of the optimizer's
            subspace, or below 1 its share of a matrix's side; None for the published one at this size.
        low_rank: factors of this rank in the place of the matrices, and `rank` stays the optimizer's.
        optimizer_options: of the optimizer: refresh, scale ...; among `settings` they count as well. By default the
            published ones, which follow the size of the model and the length of the run.
        text: files or directories; None for Python's own sources.
        tokenizer: a model whose tokenizer a fresh one takes; None for that of the embedded one.
        eval_text: text whose perplexity is measured; None for Python's held-out sources, or with a
            given model for none.
        eval_data: text held out, whose mean loss is logged every `eval_every` steps, and decides which checkpoint is
            best.
        shard: spread weights, gradients and the optimizer's state over the processes (FSDP2); so does a configuration
            of accelerate with FSDP.
        lr: None for the optimizer's published rate (1e-3 for AdamW), a tenth of it for a given model. warmup: None for
            a tenth of the steps.
        dry_run: prepare everything, train one step, write nothing, and say what the run would take.
        plan: make nothing, and say what a step would hold in bytes (`weft.plan.step`); `out` may then be None.
        **settings: fields of `Recipe` (steps, window, batch, seed ...), and options of the method, or else of the
            optimizer.

    Raises:
        WeftError: any argument that cannot work, before a model is made.
        KeyboardInterrupt: a signal came; the same call goes on from the last step to the same bits.
    """
    arguments = {k: v for k, v in locals().items() if k not in ASIDE} | settings
    structure, rank, settings = _structure(method, low_rank, rank, settings, given=model is not None)
    own = {**settings, **_checked(optimizer, optimizer_options or {})}
    recipe, options = _settings(optimizer, rank, _rate(lr, optimizer, model), warmup, own, structure)
    if structure is not None:
        options = {**find_optimizer(optimizer).on_factors, **options}
    size, tokenizer = check_beginning(model, size, tokenizer, mup, structure)
    arguments |= {"size": None, "tokenizer": None} if model else {"size": size, "tokenizer": tokenizer}
    arguments |= rows_a_step(recipe) | {"method": getattr(method, "name", method)}
    shard = asked_to_shard(shard)
    words = load_tokenizer(tokenizer)
    _check_rules(refactorise, reset_moments, structure, recipe.steps)
    _check_width(optimizer, mup, decay)
    schedule_of(schedule, recipe, restart, reset_moments or period_of(optimizer, options))
    check_judging(recipe, eval_data is not None, "" if structure is None else structure.ends)
    files = source_files(text) if text is not None else calibration_files()
    inputs = contents(model=model, tokenizer=tokenizer, text=files, eval_text=eval_text, eval_data=eval_data)
    if out is not None or not plan:
        check_output(_named(out), arguments, inputs)
    evaluation, judge = held_out(eval_text, model), None if eval_data is None else read_texts(eval_data)
    target = training_device(device)
    kind = resolve_dtype(dtype, target) or torch.bfloat16
    given = None if model is None else given_model(model, recipe.window, target, dtype, structure)
    shape: dict[str, Any] = {"given": given, "structure": structure, "mup": mup, "dtype": kind}
    empty, make, alike = _rehearse(size, words, recipe, optimizer, options, decay, shape, (refactorise, reset_moments))
    if plan:
        return {**_counted(structure, model, size, optimizer), **planned(empty, make, recipe, target, by_block=alike)}
    told = arguments | asdict(recipe) | {"schedule": schedule, "shard": shard}
    record = begin("pretrain", told, seed=recipe.seed, device=target)
    check_held_out(evaluation, words, recipe.window, eval_windows)
    original = None if structure is None or given is None else structure.original(given)
    made, base = build(size, words, recipe.window, recipe.seed, **shape, device=target)
    covered = {} if structure is None or structure.grafts else coverage(made, sum_specs(made)).facts()
    chosen: dict[str, Any] = {
        "structure": structure, "original": original, "optimizer": optimizer, "schedule": schedule, "restart": restart,
        "refactorise": refactorise, "reset_moments": reset_moments, "base": base, "decay": decay, "shard": shard,
        **options,
    }  # fmt: skip
    if dry_run:
        return _rehearsal(made, words, files, recipe, chosen)
    with open_output(_named(out), arguments, inputs) as place:
        judging: dict[str, Any] = {"evaluation": evaluation, "eval_windows": eval_windows, "eval_data": judge}
        metrics = pretrain(made, words, files, recipe, place.progress, **judging, **chosen) | covered
        _write(made, words, place, record, metrics)
    return {"output": str(out), **metrics}


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Workplace,
    record: Run,
    metrics: Mapping[str, Any],
) -> None:
    """The model and what is told of it, by one of the processes."""
    if int(os.environ.get("RANK", "0")) == 0:
        save_model(model, tokenizer, place.path, run=record.write(place.path, metrics))
        keep_logs(place)


def _rehearsal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Path],
    recipe: Recipe,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run would take, by one step of it."""
    alone = replace(recipe, load_best=False, early_stopping=None, report_to="none")
    with tempfile.TemporaryDirectory() as scratch:
        done = pretrain(model, tokenizer, files, alone, Path(scratch), callbacks=[OneStep()], **chosen)
    return rehearsed(recipe, done)


def _counted(structure: Structure | None, model: str | None, size: str, optimizer: str) -> dict[str, Any]:
    """What a plan counts. Raises WeftError where that is less than a step holds."""
    begun = ({"size": size} if model is None else {"model": model}) | {"optimizer": optimizer}
    if structure is None:
        return begun
    held = structure.uncounted
    if held:
        raise WeftError(
            f"--plan counts one model and its pass, and {structure.method.name} holds {held[0]} besides; measure a "
            "step with --dry-run."
        )
    return begun | structure.described()


def _structure(
    method: str | Method | None, low_rank: int | None, rank: float | None, settings: Mapping[str, Any], *, given: bool
) -> tuple[Structure | None, float | None, dict[str, Any]]:
    """What stands in the place of the matrices, the rank that is left for the optimizer, and the settings that are."""
    if low_rank is not None and method is not None:
        raise WeftError("--low-rank R is short for --method low-rank --rank R: give one of the two.")
    if low_rank is not None:
        return Structure.of("low-rank", low_rank), rank, dict(settings)
    if method is None:
        return None, rank, dict(settings)
    found = Structure.of(method).method
    own = {key: value for key, value in settings.items() if key in found.defaults}
    left = {key: value for key, value in settings.items() if key not in own}
    return Structure.of(found, rank, own, given), None, left


def _rate(given: float | None, optimizer: str, model: str | None) -> float:
    """The peak rate."""
    return default_rate(optimizer) * (1.0 if model is None else GOING_ON) if given is None else given


def _checked(optimizer: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    check_options(optimizer, options)
    return options


def _settings(
    optimizer: str,
    rank: float | None,
    lr: float,
    warmup: int | None,
    settings: Mapping[str, Any],
    structure: Structure | None,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and what is left for the optimizer."""
    known = {field.name for field in fields(Recipe)}
    options = {key: value for key, value in settings.items() if key not in known}
    if rank is not None:
        options["rank"] = _rank(optimizer, rank)
    known_to = default_options(optimizer)
    strange = next((key for key in options if key not in known_to), None)
    if strange is not None and structure is not None:
        method = structure.method
        raise WeftError(
            f"{optimizer!r} has no option {strange!r}, nor has {method.name!r}; they have: "
            f"{', '.join(sorted(known_to))}, and: {', '.join(method.defaults) or 'none'}."
        )
    check_options(optimizer, options)
    recipe = {"window": 256, "batch": 16, "clip": 0.0} | {k: v for k, v in settings.items() if k in known}
    recipe["lr"] = lr
    recipe["warmup"] = int(recipe.get("steps", Recipe.steps)) // 10 if warmup is None else warmup
    made = Recipe(**recipe)
    return made, chosen_options(optimizer, options, made.steps)


def _rank(optimizer: str, rank: float) -> float:
    """r as an int, or below 1 the share of a matrix's side."""
    if "rank" not in default_options(optimizer):
        raise WeftError(
            f"--rank is the rank of an optimizer's subspace, and {optimizer} has none; choose galore, fira, apollo ..."
        )
    if not (0 < rank < 1 or (rank >= 1 and rank == int(rank))):
        raise WeftError(f"--rank is {rank:g}: give a whole number from 1, or below 1 the share of a matrix's side.")
    return int(rank) if rank >= 1 else rank


def _check_rules(refactorise: int | None, reset_moments: int | None, structure: Structure | None, steps: int) -> None:
    for name, value in (("refactorise", refactorise), ("reset-moments", reset_moments)):
        if value is not None and value < 1:
            raise WeftError(f"--{name} is {value}: give the steps between two, at least 1.")
        if value is not None:
            in_time(value, steps, f"--{name}")
    if refactorise is not None and structure is None:
        raise WeftError("--refactorise re-balances low-rank factors: give --low-rank RANK too.")


def _check_width(optimizer: str, mup: int | None, decay: str) -> None:
    if mup is not None and not find_optimizer(optimizer).by_width:
        raise WeftError(f"--mup sets learning rates by width for AdamW; --optimizer {optimizer} has groups of its own.")
    if decay not in ("sqrt", "independent", "fixed"):
        raise unknown("width rule of weight decay", decay, ("sqrt", "independent", "fixed"))


def _rehearse(
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    optimizer: str,
    options: Mapping[str, Any],
    decay: str,
    shape: Mapping[str, Any],
    every: tuple[int | None, int | None],
) -> tuple[PreTrainedModel, Callable[[nn.Module], torch.optim.Optimizer], bool]:
    """Make the model, its optimizer and its rules without storage: raises what would be raised once they are large. The
    model, what makes the optimizer, and whether both do without some of the blocks are returned.
    """
    given, structure = shape["given"] and emptied(shape["given"]), shape["structure"]
    with torch.device("meta"), Supposed():
        original = None if structure is None or given is None else structure.original(given)
        model, base = build(size, tokenizer, recipe.window, recipe.seed, **{**shape, "given": given})
        chosen = chosen_options(optimizer, options, recipe.steps, model)

        def make(model: nn.Module) -> torch.optim.Optimizer:
            rates = (recipe.lr, recipe.weight_decay, recipe.seed)
            return make_optimizer(optimizer, model, *rates, chosen, base, decay)

        made = make(model)
        rules = Rules(rules_of(model, structure, original, recipe, *every))
        rules.bind(made)
        rules.start(model, steps=recipe.steps)
    return model, make, base is None and (structure is None or not structure.grafts)


def _named(out: str | Path | None) -> str | Path:
    if out is None:
        raise WeftError("Give the directory to write: -o OUT. Only --plan does without.")
    return out
