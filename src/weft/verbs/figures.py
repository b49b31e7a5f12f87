"""What is told of a training run: what it did, or, by one step of it (`--dry-run`), what it would take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.io.precision import as_stored
from weft.train.packing import Rows
from weft.train.recipe import Recipe
from weft.verbs.adapt import trainable
from weft.verbs.evaluate import evaluate

__all__ = ["as_written", "course", "perplexity_on", "rehearsed", "summary"]


def summary(model: PreTrainedModel, rows: Rows, recipe: Recipe, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was trained, on what, and the first and last logged loss."""
    updated, run = trainable(model), course(recipe, log)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        **run,
        "trainable_parameters": updated.count,
        "parameters": updated.total,
        "examples": rows.examples,
        "examples_dropped": rows.dropped,
        "examples_shortened": rows.shortened,
        "rows": len(rows),
        "tokens": rows.tokens,
        "processes": processes,
        "epochs": run["steps"] * recipe.batch * recipe.accumulate * processes / len(rows),
    }


def course(recipe: Recipe, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The steps taken, which early stopping makes fewer, the first and the last logged loss, and the loss on data held
    out: the last one, or the least where its weights are kept.
    """
    losses = [line["loss"] for line in log if "loss" in line] or [None]
    judged = [line["eval_loss"] for line in log if "eval_loss" in line]
    return {
        "steps": max((line["step"] for line in log), default=recipe.steps),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        **({"eval_loss": min(judged) if recipe.load_best else judged[-1]} if judged else {}),
    }


def perplexity_on(
    text: str | Sequence[str] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    windows: int | None,
) -> dict[str, float]:
    """The perplexity on a text, so many windows of it; nothing where there is none."""
    if text is None:
        return {}
    found = evaluate(model, tokenizer, text, recipe.window, windows=windows, bos=recipe.bos)
    return {"perplexity": found["perplexity"]}


def as_written(model: PreTrainedModel, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What is measured of the numbers that will be written, which are rounded where training was in a wider dtype."""
    with as_stored(model, widened=True):
        return measure()


def rehearsed(recipe: Recipe, done: Mapping[str, Any]) -> dict[str, Any]:
    """What one step has shown of a run by this recipe; `done` is what training that step returned."""
    rows = recipe.batch * recipe.accumulate * done["processes"]
    kept = ("parameters", "trainable_parameters", "rows", "processes", "optimizer_bytes", "peak_memory_bytes")
    return {
        "dry_run": True,
        **{key: done[key] for key in kept if key in done},
        "rows_a_step": rows,
        "tokens_a_step": rows * recipe.window,
        "steps": recipe.steps,
        **({"epochs": rows * recipe.steps / done["rows"]} if "rows" in done else {}),
        **({"trainable_share": done["trainable_parameters"] / done["parameters"]} if "rows" in done else {}),
        "seconds_a_step": done["seconds"],
        "seconds": done["seconds"] * recipe.steps,
    }
