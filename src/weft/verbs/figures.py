"""What is told of a training run: what it did, or, by one step of it (`--dry-run`), what it would take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from weft.train.packing import Rows
from weft.train.recipe import Recipe
from weft.verbs.adapt import trainable

__all__ = ["first_and_last", "rehearsed", "summary"]


def summary(model: PreTrainedModel, rows: Rows, recipe: Recipe, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was trained, on what, and the first and last logged loss."""
    updated = trainable(model)
    judged = [line["eval_loss"] for line in log if "eval_loss" in line]
    steps = max((line["step"] for line in log), default=recipe.steps)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "steps": steps,
        "trainable_parameters": updated.count,
        "parameters": updated.total,
        "examples": rows.examples,
        "examples_dropped": rows.dropped,
        "examples_shortened": rows.shortened,
        "rows": len(rows),
        "tokens": rows.tokens,
        "processes": processes,
        "epochs": steps * recipe.batch * recipe.accumulate * processes / len(rows),
        **first_and_last(log),
        **({"eval_loss": min(judged) if recipe.load_best else judged[-1]} if judged else {}),
    }


def first_and_last(log: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The first and the last logged loss."""
    losses = [line["loss"] for line in log if "loss" in line] or [None]
    return {"loss_first": losses[0], "loss_last": losses[-1]}


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
