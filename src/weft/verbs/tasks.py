"""Tasks of lm-evaluation-harness on a model in memory: compressed, adapted, or neither.

    weft.verbs.tasks.evaluate_tasks(model, tokenizer, ["hellaswag", "my_task.yaml"]) -> {"hellaswag": {"acc": ...}, ...}

A name is one of the harness' own tasks; a path is a task file of its format. What is measured, and how, is its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.errors import WeftError, unknown

__all__ = ["check_tasks", "evaluate_tasks"]


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises WeftError where the harness is not installed, there are no tasks, or a task's file is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise WeftError("--tasks needs lm-evaluation-harness: pip install 'weft[eval]'.")
    if not tasks:
        raise WeftError("--tasks names no task; give names or files, such as --tasks hellaswag,my_task.yaml.")
    for task in tasks:
        if _is_file(task) and not Path(task).is_file():
            raise WeftError(f"There is no task file {task}.")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """What the harness measures: task -> {"acc": ..., "acc_stderr": ..., "samples": ...}.

    Args:
        tasks: names of the harness' own, or files of its format (.yaml).
        limit: questions of each task; all by default.
        batch: questions at once.
        seed: of the examples shown before a question.

    Raises:
        WeftError: as `check_tasks`; or a name that the harness does not know.
    """
    check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    named = [task for task in tasks if not _is_file(task)]
    manager = TaskManager(include_defaults=bool(named))  # reading all of the harness' own takes seconds
    for name in named:
        if not manager.match_tasks([name]):
            raise unknown("task", name, manager.all_tasks)
    seeds = {f"{what}_random_seed": seed for what in ("torch", "numpy", "fewshot")}
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        random_seed=seed,
        log_samples=False,
        **seeds,
    )
    assert found is not None  # on the process of rank 0
    return {task: _measures(entry) for task, entry in found["results"].items()}


def _measures(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by name; the harness writes "acc,none", the filter after the comma."""
    numbers = {key.removesuffix(",none"): value for key, value in entry.items() if isinstance(value, int | float)}
    return {key.replace("_stderr,none", "_stderr"): value for key, value in numbers.items()}


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))
