"""The training of `weft pretrain`: steps of an optimizer over a text that is tokenised in the background."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from weft.optim import fold_weights
from weft.optim.state import state_bytes, tensor_bytes
from weft.rules import Rule
from weft.rules.refactorise import Refactorise
from weft.rules.reset_moments import ResetMoments
from weft.train.optimizers import chosen_options, make_optimizer
from weft.train.recipe import Recipe
from weft.train.sharding import sharded
from weft.train.stream import StreamedRows
from weft.train.trainer import train
from weft.verbs.evaluate import model_size, peak_memory, reset_peak_memory
from weft.verbs.figures import as_written, course, perplexity_on
from weft.verbs.finetune import check_judging, rows_of
from weft.verbs.fresh import Structure, finish
from weft.verbs.pace import period_of, schedule_of

__all__ = ["pretrain", "rules_of"]


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Path],
    recipe: Recipe,
    directory: Path,
    *,
    structure: Structure | None = None,
    original: nn.Module | None = None,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    restart: int = 0,
    refactorise: int | None = None,
    reset_moments: int | None = None,
    base: nn.Module | None = None,
    decay: str = "sqrt",
    evaluation: str | Sequence[str] | None = None,
    eval_windows: int | None = None,
    eval_data: Sequence[str] | None = None,
    shard: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train `model` in place on the files' text, and return what was measured.

    Args:
        files: text, JSONL or Parquet files; each document ends with the end-of-text token.
        directory: for the token stream, checkpoints and metrics; training goes on from the last checkpoint in it.
        structure: that the model was built with (`build`); its method's rules run around the steps, and in the end the
            layers become what it leaves.
        original: the model before it was (`Structure.original`), for methods whose rules follow it.
        optimizer: "adamw" or a name of `weft.optim.OPTIMIZERS`; its options (rank, refresh, scale, projection ...) as
            `options`.
        schedule: "cosine" (to a tenth), "wsd" or "constant", after `recipe.warmup` steps of warm-up.
        restart: steps of warm-up after each refresh of the optimizer's subspace (or reset of its moments).
        refactorise: steps between two re-balancings of low-rank factors; reset_moments: between two resets of all
            moments.
        base: the narrow model of width scaling; decay: how weight decay scales with width
            (`weft.optim.mup.mup_groups`).
        evaluation: text whose perplexity is measured in the end and every `recipe.eval_every` steps, `eval_windows`
            windows of it.
        eval_data: texts held out, whose mean loss is logged as often, and decides which checkpoint is best.
        shard: spread weights, gradients and the optimizer's state over the processes (`weft.train.sharding`).

    Raises:
        WeftError: a text that is too short, or a best checkpoint is asked for and there are no texts held out.
    """
    check_judging(recipe, eval_data is not None, "" if structure is None else structure.ends)
    measure = partial(perplexity_on, evaluation, model, tokenizer, recipe, eval_windows)
    options = chosen_options(optimizer, options, recipe.steps, model)
    plan = schedule_of(schedule, recipe, restart, reset_moments or period_of(optimizer, options))
    device = next(model.parameters()).device
    reset_peak_memory(device)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    judge = None if eval_data is None else rows_of(model, tokenizer, eval_data, recipe)
    count = recipe.steps * recipe.batch * recipe.accumulate * processes
    began, tokens = time.perf_counter(), directory / f"tokens-{rank}.bin"
    with (
        sharded(model, shard),
        StreamedRows(files, tokenizer, recipe.window, count, recipe.seed, tokens, recipe.bos) as rows,
    ):
        rows[0]  # says whether the text is too short, before anything is kept
        made = make_optimizer(optimizer, model, recipe.lr, recipe.weight_decay, recipe.seed, options, base, decay)
        log = train(
            model,
            rows,
            recipe,
            directory,
            optimizer=lambda: made,
            scheduler=lambda optim: LambdaLR(optim, plan),
            widen=False,
            rules=(rules := rules_of(model, structure, original, recipe, refactorise, reset_moments)),
            measure=measure if evaluation is not None else None,
            judge=judge,
            callbacks=callbacks,
        )
        run = course(recipe, log)
        seen = _seen(rows, run["steps"], count, recipe)
        of_optimizer = state_bytes(made) + tensor_bytes(*(rule.state_dict() for rule in rules))  # dqt's moments
    _leave(model, structure)
    return {
        **run,
        "processes": processes,
        "parameters": model_size(model)[0],
        **seen,
        **({} if structure is None else structure.described()),
        "optimizer_options": options,
        "optimizer_bytes": of_optimizer,
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory(device),
        **as_written(model, measure),
    }


def _seen(rows: StreamedRows, steps: int, count: int, recipe: Recipe) -> dict[str, float]:
    """What so many steps saw, of the `count` rows that all steps would see."""
    seen = count * steps // recipe.steps
    return {"tokens": seen * recipe.window, "epochs": seen / min(rows.windows, count)}


def rules_of(
    model: nn.Module,
    structure: Structure | None,
    original: nn.Module | None,
    recipe: Recipe,
    refactorise: int | None,
    reset_moments: int | None,
) -> list[Rule]:
    """What happens around the steps: the rules of the structure, and what was asked for besides."""
    found = [] if structure is None else structure.rules(model, recipe.seed, original)
    found += [Refactorise(refactorise)] if refactorise else []
    return found + ([ResetMoments(reset_moments)] if reset_moments else [])


def _leave(model: PreTrainedModel, structure: Structure | None) -> None:
    """After the last step: what optimizer and method leave in the model."""
    fold_weights(model)  # gradnormlorp's lengths and directions become the matrices that they stand for
    if structure is not None:
        finish(model, structure)
