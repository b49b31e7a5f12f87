"""Fine-tune a model: train what a method trains, and freeze the rest.

welore    the low-rank components of a compressed model        lora and its kin    adapters, put on first
full      every parameter                                      any other method    what its record says is trained
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from weft.embedded.text import calibration_files
from weft.errors import WeftError
from weft.grafts.base import graft_of
from weft.grafts.base import write as write_graft
from weft.io.adapters import write_adapter
from weft.io.plain import check_matrices
from weft.io.quantizer import sum_specs
from weft.io.save import adapter_card, save_model
from weft.methods import Method
from weft.progress import say
from weft.records import find
from weft.runs.calibration import say_default
from weft.runs.inputs import contents
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve_device
from weft.runs.output import check_output, keep_logs, open_output
from weft.runs.record import Result, Run, begin
from weft.terms.adapters import adapters_of
from weft.terms.coverage import coverage
from weft.train.data import training_rows
from weft.train.metrics import OneStep
from weft.train.optimizers import check_options, chosen_options, make_optimizer
from weft.train.packing import Rows
from weft.train.recipe import Recipe
from weft.train.sources import Document, Fields, Skipped, Text, read_documents, read_texts
from weft.train.trainer import train
from weft.verbs.adapt import effective_rates, merge_adapter, parameter_groups
from weft.verbs.adapt import make_optimizer as adapter_optimizer
from weft.verbs.beginning import check_held_out
from weft.verbs.evaluate import check_causal, check_context, peak_memory, reset_peak_memory
from weft.verbs.figures import as_written, perplexity_on, rehearsed, summary
from weft.verbs.fresh import ends_of
from weft.verbs.preparing import check_states, check_teacher, leave, lesson_of, load_teacher, prepare
from weft.verbs.targets import check_targets

__all__ = ["finetune", "run"]

KINDS = ("compress", "adapt", "graft", "train")


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Sequence[str | Document],
    method: str = "welore",
    *,
    rank: int | None = None,
    targets: str | Sequence[str] | None = None,
    optimizer: str | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    evaluation: str | Sequence[str] | None = None,
    eval_windows: int | None = None,
    eval_data: str | Sequence[str | Document] | None = None,
    teacher: PreTrainedModel | None = None,
    teacher_top: int | None = None,
    teacher_labels: float | None = None,
    teacher_features: float | None = None,
    directory: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    skipped: Skipped | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train `model` in place by `method`, and return what was measured.

    Args:
        data: texts, or documents of `weft.train.sources` (with prompts, or chats).
        method: what is trained; a name of `weft.methods()`.
        rank: of adapters (16 by default); for other methods, of the optimizer's subspace (by default its own).
        targets: layers that get an adapter, as in `weft.adapt`; all by default.
        optimizer: a name of `weft.optim.OPTIMIZERS`; by default what the method asks for, or AdamW.
        optimizer_options: its options; by default the published ones, which follow the size of what is trained and the
            length of the run.
        evaluation: text whose perplexity is measured before, after, and every `eval_every` steps.
        eval_windows: how many windows of it; all by default.
        eval_data: documents held out, as `data`, whose mean loss is logged every `eval_every` steps.
        teacher: a model of the same tokens, on the same device, whose predictions are learned in the place of the
            labels: the divergence KL(teacher || model), see `weft.memory.lesson`. It is frozen.
        teacher_top: look at the teacher's so many most likely tokens by themselves (after TopKLD).
        teacher_labels: weight of the labels' own loss beside that; None for the method's own, most often 0.
        teacher_features: weight of how far the states after each block are from the teacher's, relative to their size,
            see `weft.rules.features`; a model of fewer blocks follows evenly spread ones. None for none.
        directory: for checkpoints and metrics; training goes on from the last checkpoint in it. None keeps none.
        callbacks: of transformers, beside weft's own.
        skipped: gets the chats that are left out because the template refuses them; None leaves none out.
        **settings: steps, lr, window, batch, accumulate, seed ... (the fields of `weft.train.recipe.Recipe`), and
            options of the method.

    Raises:
        WeftError: an unknown method or setting, nothing to train, or no data to learn from.
        KeyboardInterrupt: a signal came; the step under way was finished and, with a `directory`, saved.

    Example:
        >>> done = weft.finetune(model, tokenizer, text, "lora", rank=4, steps=2, batch=2, window=32)
    """
    recipe, options = split_settings(settings)
    chosen = find(method, *KINDS)
    check_judging(recipe, eval_data is not None, ends_of(chosen, options))
    check_context(model, recipe.window)
    check_targets(chosen, targets, model)
    lesson = lesson_of(model, chosen, teacher, teacher_top, teacher_labels, teacher_features)
    if isinstance(chosen, Method) and chosen.kind == "compress":
        chosen.freeze(model)  # says at once where the model has nothing that it trains
    rows = rows_of(model, tokenizer, data, recipe, skipped)
    judge = None if eval_data is None else rows_of(model, tokenizer, eval_data, recipe, skipped)
    choice = optimizer_settings(optimizer, optimizer_options or {}, rank, chosen.kind == "adapt", recipe.steps)
    rules = prepare(model, rows, chosen, rank, recipe, options, targets)
    if optimizer is not None:
        choice = chosen_options(optimizer, choice, recipe.steps, model)

    measure = partial(perplexity_on, evaluation, model, tokenizer, recipe, eval_windows)
    before, device = measure(), next(model.parameters()).device
    reset_peak_memory(device)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        log = train(
            model,
            rows,
            recipe if directory or recipe.load_best else replace(recipe, save_every=recipe.steps),
            directory or Path(scratch),
            optimizer=stepping(optimizer, model, recipe, choice),
            rules=rules,
            more=lambda lr: scaled_rates(model, lr),
            measure=measure if evaluation is not None else None,
            judge=judge,
            teacher=lesson,
            callbacks=callbacks,
        )
    leave(model, chosen, options)
    done = summary(model, rows, recipe, log)
    done |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(device), "packed": rows.packed}
    done |= {"optimizer_options": choice} if optimizer else {}
    return Result({**done, **{f"{name}_before": value for name, value in before.items()}, **as_written(model, measure)})


def as_documents(data: str | Sequence[str | Document]) -> list[Document]:
    """Texts as documents."""
    return [Text(d) if isinstance(d, str) else d for d in ([data] if isinstance(data, str) else data)]


def rows_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Sequence[str | Document],
    recipe: Recipe,
    skipped: Skipped | None = None,
) -> Rows:
    """The data as the rows of a recipe; says why where they are not packed. Raises WeftError as `training_rows`."""
    rows, refusal = training_rows(model, tokenizer, as_documents(data), recipe.window, recipe.bos, skipped)
    if refusal:
        say(f"One document a row and padding: {refusal}.")
    return rows


def check_judging(recipe: Recipe, judged: bool, ends: str = "") -> None:
    """Raises WeftError for what asks for the loss on data held out, where there are none, or may leave a model of
    before the end of the run, where something comes by that alone (`weft.verbs.fresh.ends_of`).
    """
    for name, asked in (("load-best", recipe.load_best), ("early-stopping", recipe.early_stopping)):
        if asked and not judged:
            raise WeftError(f"--{name} goes by the loss on data held out: give --eval-data.")
        if asked and ends:
            raise WeftError(
                f"--{name} may leave a model of before the end of the run, and {ends} comes only there: leave it out."
            )


def stepping(
    name: str | None, model: PreTrainedModel, recipe: Recipe, options: Mapping[str, Any]
) -> Callable[[], torch.optim.Optimizer]:
    """What makes the optimizer: the one that the method asks for (AdamW by default, at its rates), or the named one."""
    if name is None:
        return lambda: adapter_optimizer(model, recipe.lr, recipe.weight_decay)
    if len({group["lr"] for group in parameter_groups(model, recipe.lr)}) > 1:
        raise WeftError(
            f"The method gives its factors learning rates of their own, which --optimizer {name} cannot follow."
        )
    return lambda: make_optimizer(name, model, recipe.lr, recipe.weight_decay, recipe.seed, options)


def optimizer_settings(
    name: str | None, given: Mapping[str, Any], rank: int | None, adapts: bool, steps: int
) -> dict[str, Any]:
    """The options of the optimizer that do not depend on the model: those given, --rank where the method does not take
    it, and what follows the length of the run.

    Raises WeftError for an option that the optimizer has not, or options without an optimizer.
    """
    if name is None:
        if given:
            raise WeftError("--optimizer-option is for an optimizer that you name: give --optimizer NAME too.")
        return {}
    subspace = {} if adapts or rank is None else {"rank": rank}
    check_options(name, {**subspace, **given})
    return chosen_options(name, {**subspace, **given}, steps)


def scaled_rates(model: PreTrainedModel, lr: float) -> dict[str, float]:
    """scale * lr of each adapter, the rate that decides how fast its delta moves."""
    return {f"scaled_learning_rate_{name}": rate for name, rate in effective_rates(model, lr).items()}


def run(
    model: str,
    out: str | Path,
    *,
    method: str = "welore",
    data: str | Path | Sequence[str | Path] | None = None,
    rank: int | None = None,
    targets: str | Sequence[str] | None = None,
    optimizer: str | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    eval_text: str | Path | Sequence[str | Path] | None = None,
    eval_windows: int | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    teacher: str | None = None,
    teacher_top: int | None = None,
    teacher_labels: float | None = None,
    teacher_features: float | None = None,
    split: str = "train",
    text_field: str | None = None,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    messages_field: str | None = None,
    skip_bad: int = 0,
    dry_run: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    merge: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """`weft finetune`: read a model and data, train, write a directory with `run.json` and `metrics.jsonl`.

    It is an adapter's where the method trains one, and the model's otherwise.

    Args:
        merge: fold the adapter into the model and write that instead.
        data: files or directories as `weft.train.sources.read_documents` takes them; None for Python's own sources.
        eval_text: text to measure perplexity on, before and after; of it, `eval_windows` windows.
        eval_data: data held out, read as `data`, whose loss is logged every `eval_every` steps.
        teacher: a model whose predictions are learned in the place of the labels; `teacher_top`, `teacher_labels`
            and `teacher_features` say how, as in `finetune`.
        skip_bad: records in which something is wrong that may be left out; they are listed.
        dry_run: prepare everything, train one step, write nothing, and say what the run would take.
        **settings: fields of `Recipe` (steps, lr, window, batch, seed ...), and options of the method.

    An interrupted run keeps its last checkpoint beside `out`, and the same call goes on from it to the same bits.

    Raises:
        WeftError: any argument that cannot work, before the model is loaded where it can be told.
        KeyboardInterrupt: a signal came; what was done is kept.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("settings", "device", "dry_run")} | settings
    recipe, options = split_settings(settings)
    check_method(method, rank, options, optimizer, targets)
    check_merge(method, merge)
    optimizer_settings(optimizer, optimizer_options or {}, rank, find(method).kind == "adapt", recipe.steps)
    check_judging(recipe, eval_data is not None, ends_of(find(method), options))
    lesson = check_teacher(find(method), teacher, teacher_top, teacher_labels, teacher_features)
    names = Fields(text_field, prompt_field, completion_field, messages_field)
    files = calibration_files() if data is None else data
    inputs = contents(model=model, teacher=teacher, data=files, eval_text=eval_text, eval_data=eval_data)
    check_output(out, arguments, inputs)
    if data is None:
        say_default(model, "training", "Python's own sources", "--data")
    skipped = Skipped(skip_bad)
    documents = [*map(Text, read_texts(files))] if data is None else read_documents(data, names, split, skipped)
    judge = None if eval_data is None else read_documents(eval_data, names, split, skipped)
    evaluation = None if eval_text is None else read_texts(eval_text)
    config = load_config(model, trust_remote_code=trust_remote_code)
    check_causal(config)
    check_context(config, recipe.window)
    check_states(config, load_config(teacher or model, trust_remote_code=trust_remote_code), lesson)
    target = training_device(device)
    record = begin("finetune", arguments | asdict(recipe), seed=recipe.seed, device=target)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    check_held_out(evaluation, tokenizer, recipe.window, eval_windows)
    known = None if teacher is None else load_teacher(teacher, tokenizer, target, trust_remote_code=trust_remote_code)
    source = load_model(model, device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    check_matrices(source, sum_specs(source) if merge else ())
    what: dict[str, Any] = {"method": method, "rank": rank, "targets": targets, "skipped": skipped, "teacher": known}
    what |= {"optimizer": optimizer, "optimizer_options": optimizer_options}
    what |= {"teacher_top": teacher_top, "teacher_labels": teacher_labels, "teacher_features": teacher_features}
    if dry_run:
        return _rehearsal(recipe, source, tokenizer, documents, **what, **settings)
    with open_output(out, arguments, inputs) as place:
        metrics = finetune(
            source, tokenizer, documents, evaluation=evaluation, eval_windows=eval_windows, eval_data=judge,
            directory=place.progress, **what, **settings,
        )  # fmt: skip
        metrics |= {"skipped": skipped.errors} if skip_bad else {}
        on = [layer for adapter in adapters_of(source).values() for layer in adapter.terms]
        metrics |= coverage(source, on).facts() if on else {}
        if int(os.environ.get("RANK", "0")) == 0:
            save(source, tokenizer, place.path, metrics, record, kind="" if merge else find(method).kind)
            keep_logs(place)
    return {"output": str(out), **metrics}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    metrics: dict[str, Any],
    record: Run,
    *,
    kind: str,
) -> None:
    """Write what was trained, of a method of this kind: the adapter, or the graft, beside the tokenizer it was trained
    with; or the model, where its own weights were, with adapters merged.
    """
    graft = graft_of(model) if kind == "graft" else None
    if kind == "adapt" or (graft is not None and not graft.whole):
        if graft is not None:
            write_graft(model, directory)
        else:
            write_adapter(model, directory, *(one.name for one in adapters_of(model).values() if one.active))
        tokenizer.save_pretrained(directory)
        card = adapter_card(directory, record.write(directory, metrics))
        (directory / "README.md").write_text(card, encoding="utf-8")
        return
    for name in adapters_of(model):
        metrics["update_lost"] = max([metrics.get("update_lost", 0.0), *merge_adapter(model, name).values()])
    save_model(model, tokenizer, directory, run=record.write(directory, metrics))


def _rehearsal(recipe: Recipe, model: PreTrainedModel, *arguments: Any, **settings: Any) -> dict[str, Any]:
    """What a run would take, by one step of it."""
    watch = OneStep()
    alone = {"load_best": False, "early_stopping": None, "report_to": "none"}
    done = finetune(model, *arguments, callbacks=[watch], **{**settings, **alone})
    return rehearsed(recipe, {**done, "optimizer_bytes": watch.bytes})


def training_device(device: str | None) -> torch.device:
    """The device that the Trainer will use: the CPU, or the GPU of this process (torchrun sets LOCAL_RANK)."""
    target, local = resolve_device(device), int(os.environ.get("LOCAL_RANK", "0"))
    if target.type != "cuda":
        return target
    if target.index not in (None, local):
        raise WeftError(f"Training runs on the first visible GPU: set CUDA_VISIBLE_DEVICES={target.index} instead.")
    return torch.device("cuda", local)


def split_settings(settings: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and what is left for the method."""
    known = {field.name for field in fields(Recipe)}
    options = {key: value for key, value in settings.items() if key not in known}
    return Recipe(**{key: value for key, value in settings.items() if key in known}), options


def check_method(
    method: str,
    rank: int | None,
    options: Mapping[str, Any],
    optimizer: str | None,
    targets: str | Sequence[str] | None,
) -> None:
    """Raises WeftError for an unknown method or option, a rank below 1, and a rank or targets for nothing."""
    found = find(method, *KINDS)
    found.options(options)
    check_targets(found, targets)
    if rank is not None and rank < 1:
        raise WeftError(f"--rank is {rank}: give at least 1.")
    if rank is not None and optimizer is None and found.kind != "adapt":
        raise WeftError(f"--rank is an adapter's, or an --optimizer's, and {method} has none: leave it out.")


def check_merge(method: str, merge: bool) -> None:
    """Raises WeftError where there will be no adapter to merge, or one that is no matrix."""
    found = find(method)
    if merge and found.kind != "adapt":
        raise WeftError(f"--merge folds an adapter into its model, and {method} trains none: leave it out.")
    if merge and isinstance(found, Method) and "merges" in found.exempt:
        raise WeftError(f"--merge folds an adapter into its model, and {method} cannot be: leave it out.")
