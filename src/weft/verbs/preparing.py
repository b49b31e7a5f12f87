"""What `weft finetune` does to a model before it trains: adapters put on, the rest frozen, a teacher found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.grafts import Graft
from weft.memory.lesson import Lesson
from weft.methods.base import Method
from weft.progress import say
from weft.records import Record
from weft.rules import Rule, make_rules
from weft.rules.features import paired
from weft.runs.loading import load_model, load_tokenizer
from weft.terms.adapters import adapters_of
from weft.terms.coverage import untrained
from weft.train.packing import Rows, collate
from weft.train.recipe import Recipe
from weft.verbs.adapt import adapt
from weft.verbs.adapt import rules as adapter_rules
from weft.verbs.fresh import Structure, finish, restructure
from weft.verbs.targets import ALL

__all__ = [
    "calibration",
    "check_states",
    "check_teacher",
    "leave",
    "lesson_of",
    "load_teacher",
    "prepare",
    "with_totals",
]

CALIBRATION_ROWS = 32  # of the training data, for adapters that start from statistics


def prepare(
    model: PreTrainedModel,
    rows: Rows,
    method: Record,
    rank: int | None,
    recipe: Recipe,
    options: Mapping[str, Any],
    targets: str | Sequence[str] | None = None,
) -> list[Rule]:
    """Put adapters or a graft on where the method is one, freeze what is not trained; the rules to train with. An
    adapter that came with the model, of the same method, is trained further.
    """
    if any(adapter.method == method.name for adapter in adapters_of(model).values()) and not (
        rank or options or targets
    ):
        say(f"The model's own {method.name} adapter is trained further.")
        return adapter_rules(model)
    options = with_totals(method, recipe, options)
    if isinstance(method, Graft):
        batches = calibration(rows, recipe) if method.start else None
        adapt(model, method, batches=batches, seed=recipe.seed, **options)
        return []
    assert isinstance(method, Method)
    if method.kind == "adapt":
        batches = calibration(rows, recipe) if method.needs else None
        adapt(model, method, rank, targets=targets or ALL, batches=batches, seed=recipe.seed, **options)
        return adapter_rules(model)
    chosen = method.options(options)
    if method.kind == "train" and method.split is not None:
        restructure(model, Structure(method, None, chosen), recipe.seed)
    method.freeze(model)
    fixed = untrained(model) if method.kind == "train" and method.split is None else []
    if fixed:
        say(f"{len(fixed)} matrices are in codes that no step changes, such as {fixed[0]}: the rest is trained.")
    return make_rules(method.rules, {"rank": rank, "seed": recipe.seed, **chosen})


def leave(model: PreTrainedModel, method: Record, options: Mapping[str, Any]) -> None:
    """After the last step: the layers as a method of kind "train" leaves them."""
    if isinstance(method, Method) and method.kind == "train" and method.finish is not None:
        finish(model, Structure(method, None, method.options(options)))


def with_totals(method: Record, recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, and the run's own `lr`, with its warm-up, where the method has options of these names: lora-sb
    starts from the first step that training would take after the published warm-up, a fiftieth of the run, where the
    run has none. Rules learn of the steps when they start.
    """
    if "lr" not in method.defaults:
        return dict(options)
    first = recipe.warmup or max(1, round(recipe.steps / 50))
    warmup = {"warmup": first} if "warmup" in method.defaults else {}
    return {"lr": recipe.lr, **warmup, **options}


def calibration(rows: Rows, recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    """The batches that training sees first (of one process), up to 32 rows: in them as in its loss, prompts, templates
    and borders of documents count.
    """
    order = list(rows.order(min(CALIBRATION_ROWS, len(rows)), recipe.seed))
    return [
        collate([rows[i] for i in order[start : start + recipe.batch]]) for start in range(0, len(order), recipe.batch)
    ]


def check_teacher(
    method: Record, teacher: Any, top: int | None, labels: float | None, features: float | None = None
) -> Lesson:
    """What is learned of the teacher, labels None standing for the method's own weight. Raises WeftError for a choice
    that makes no sense, or one without a teacher.
    """
    published = method.labels if isinstance(method, Method) else None
    if published is not None and teacher is None:
        raise WeftError(f"{method.name} learns the predictions of the model before it was quantised: give --teacher.")
    labels = published or 0.0 if labels is None else labels
    for option, given in (("top", top is not None), ("labels", labels != 0), ("features", features is not None)):
        if given and teacher is None:
            raise WeftError(f"--teacher-{option} is for a teacher that you name: give --teacher MODEL too.")
    return Lesson(top, labels, features)


def lesson_of(
    model: PreTrainedModel, method: Record, teacher: PreTrainedModel | None, *what: Any
) -> tuple[PreTrainedModel, Lesson] | None:
    """The teacher, frozen, and what is learned of it, as `check_teacher` is told; None where there is none.

    Raises WeftError for a teacher that is the model itself, or whose states the model's cannot follow.
    """
    lesson = check_teacher(method, teacher, *what)
    if teacher is None:
        return None
    if teacher is model:
        raise WeftError("The teacher is the model itself, which changes while it learns; give another, loaded anew.")
    check_states(model.config, teacher.config, lesson)
    if lesson.features:
        paired(model, teacher)
    return teacher.requires_grad_(False), lesson


def check_states(mine: PreTrainedConfig, theirs: PreTrainedConfig, lesson: Lesson) -> None:
    """Raises WeftError where features are learned of a teacher of another width."""
    widths = [getattr(config.get_text_config(), "hidden_size", None) for config in (mine, theirs)]
    if lesson.features and widths[0] != widths[1]:
        raise WeftError(
            f"The model is {widths[0]} channels wide and its teacher {widths[1]}: --teacher-features compares "
            "states of one width; leave it out, and the predictions are learned alone."
        )


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, **how: Any) -> PreTrainedModel:
    """The teacher of that name. Raises WeftError where its tokens are others than the model's."""
    theirs, mine = load_tokenizer(name, **how).get_vocab(), tokenizer.get_vocab()
    if theirs != mine:
        strange = next(iter({token for token, _ in theirs.items() ^ mine.items()}))
        raise WeftError(
            f"The teacher {name} has other tokens than the model, such as {strange!r}: it cannot teach it; give the "
            "model that this one was made of."
        )
    return load_model(name, device=device, **how)
