"""Training through transformers' Trainer: `train` runs a recipe on rows with rules, resuming from the last checkpoint
bit for bit.

What is added to the Trainer: a rule's penalty enters the loss, data order and random numbers are functions of (seed,
step), and a checkpoint holds only what training changes. Mixed precision, accumulation, schedules, logging and several
processes are the Trainer's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from weft.files import METRICS_FILE, write_json
from weft.memory import lean, lean_report, unlean
from weft.memory.lesson import Lesson
from weft.memory.teaching import taught
from weft.rules import Rule, Rules
from weft.rules.features import Features
from weft.seeds import derived_seed
from weft.signals import finishing, listening
from weft.tensors import own_memory
from weft.train.callback import RuleCallback
from weft.train.checkpoints import Changes, last_checkpoint
from weft.train.identity import check_identity, frozen_digest, weights_digest
from weft.train.interrupt import Interrupt
from weft.train.metrics import MetricsLog
from weft.train.modes import checkpointing, in_half, wide
from weft.train.packing import Rows, collate
from weft.train.recipe import Recipe
from weft.train.sharding import SHARDED_FILE, is_sharded, regather, reshard
from weft.train.shown import Progress
from weft.train.stream import StreamedRows

__all__ = ["METRICS_FILE", "Trainer", "train"]


def train(
    model: PreTrainedModel,
    rows: Rows | StreamedRows,
    recipe: Recipe,
    directory: Path,
    *,
    optimizer: Callable[[], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    widen: bool = True,
    rules: Sequence[Rule] = (),
    more: Callable[[float], Mapping[str, float]] = lambda lr: {},
    measure: Callable[[], Mapping[str, float]] | None = None,
    judge: Rows | None = None,
    teacher: tuple[nn.Module, Lesson] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, Any]]:
    """Train the parameters that require a gradient, in place, and return what was logged.

    Args:
        directory: for checkpoints and metrics.jsonl; training goes on from the last complete checkpoint in it.
        optimizer: makes the optimizer of the trainable parameters, which are then in fp32 at least.
        scheduler: makes the learning-rate schedule, in place of `recipe.schedule`.
        widen: train half-precision parameters in fp32; without it they are trained as they are.
        rules: what happens around each step.
        more: learning rate -> further figures to log.
        measure: figures to log every `recipe.eval_every` steps, such as a perplexity; must leave the model as it is.
        judge: rows whose mean loss is logged as often, as `eval_loss`, and decides which checkpoint is best.
        teacher: a model whose predictions are learned in the place of the labels, and what of them and of its states.
        callbacks: further ones of transformers.

    Trainable parameters in half precision are trained in fp32 and given back in their own dtype.

    Raises KeyboardInterrupt when a signal came; the step under way was then finished and saved.
    """
    metrics = MetricsLog(directory / METRICS_FILE, more, measure, recipe.eval_every)
    features = Features(teacher[0], teacher[1].features or 0.0) if teacher else None
    rule = Rules([*rules, *([features] if features else [])])
    stopping = [Patience(recipe.early_stopping)] if recipe.early_stopping else []
    with (
        listening(),
        finishing(),
        wide(model) if widen else nullcontext(),
        leaned(model, recipe.lean),
        taught(model, *teacher) if teacher else nullcontext(),
        closing(rule),
        checkpointing(model, recipe.checkpointing),
        kept_config(model),
    ):
        own_memory(model)  # as a checkpoint's tensors will lie: products give the same bits then
        made = optimizer()
        rule.bind(made)
        trainer = Trainer(
            model,
            rule,
            rows,
            args=arguments(recipe, directory, model, judge is not None),
            eval_dataset=judge,
            data_collator=collate,
            optimizers=(made, scheduler(made) if scheduler else None),
            callbacks=[Seeds(recipe.seed), RuleCallback(rule), metrics, Progress(), *stopping, Interrupt(), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        start = last_checkpoint(directory)
        told = {"the teacher": f"{frozen_digest(teacher[0])} {teacher[1]}"} if teacher else {}
        parts = {**told, "the training data": rows.digest(), "the frozen weights of the model": weights_digest(model)}
        check_identity(directory, parts, start is not None, trainer.is_world_process_zero())
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    return metrics.records()


def arguments(recipe: Recipe, directory: Path, model: nn.Module, judged: bool = False) -> TrainingArguments:
    """The recipe in the Trainer's words; `judged` where there are rows to judge by."""
    on_gpu = next(model.parameters()).is_cuda
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        learning_rate=recipe.lr,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        save_steps=recipe.saving_steps,
        save_total_limit=recipe.save_total_limit,
        logging_steps=min(recipe.log_every, recipe.steps),
        logging_nan_inf_filter=False,
        bf16=in_half(model, recipe),
        use_cpu=not on_gpu,
        seed=recipe.seed,
        report_to=recipe.report_to,
        eval_strategy="steps" if judged else "no",
        eval_steps=recipe.judging_steps if judged else None,
        per_device_eval_batch_size=recipe.batch,
        prediction_loss_only=True,
        load_best_model_at_end=recipe.load_best,
        metric_for_best_model="eval_loss" if judged else None,
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,  # ours says how long is left, off a terminal too
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process a GPU (torchrun); never nn.DataParallel
    return args


class Trainer(transformers.Trainer):
    """transformers' Trainer with a rule's penalty in the loss, a fixed order of data, and checkpoints of changes."""

    def __init__(self, model: nn.Module, rule: Rule, train_dataset: Rows | StreamedRows, **kwargs: Any) -> None:
        super().__init__(model, train_dataset=train_dataset, **kwargs)
        self.rule, self.rows = rule, train_dataset
        self.changes, self.sharded = Changes(model), is_sharded(model)
        if self.sharded:  # gradients are summed by the shards: no DDP around them
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        penalty = self.rule.penalty(self.accelerator.unwrap_model(model)) if model.training else None
        if penalty is not None:
            # a loss normalised over all micro-batches is summed over them; others the Trainer averages itself
            summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + penalty.to(loss) / (self.current_gradient_accumulation_steps if summed else 1)
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self.rows.order(self.args.max_steps * rows_a_step, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # parameters are spread; theirs to gather
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            directory = Path(output_dir or str(self.args.output_dir))
            os.makedirs(directory, exist_ok=True)
            self.changes.save(directory)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers'; of a sharded model every process takes part."""
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        directory = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            os.makedirs(directory, exist_ok=True)
        self.changes.save(directory, write=self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state, spread = regather(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            write_json(Path(output_dir) / SHARDED_FILE, spread)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(reshard(state, self.optimizer, Path(checkpoint)))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.changes.load(Path(str(self.state.best_model_checkpoint)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.changes.load(Path(resume_from_checkpoint))


_COUNTER = "early_stopping_patience_counter"


class Patience(EarlyStoppingCallback):
    """Early stopping that goes on counting where the checkpoint was."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        kept: Any = state.stateful_callbacks  # in a checkpoint: class -> its state
        if state.global_step and isinstance(kept, Mapping) and type(self).__name__ in kept:
            self.early_stopping_patience_counter = kept[type(self).__name__]["attributes"][_COUNTER]


class Seeds(TrainerCallback):
    """Seeds the global generators before each step, so that dropout is a function of (seed, step, process)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_seed(derived_seed(self.seed, state.global_step, args.process_index))


@contextmanager
def leaned(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The memory saver on within the block; as it was before, after it."""
    before = bool(lean_report(model).lean)
    if wanted:
        lean(model)
    try:
        yield
    finally:
        if not before:
            unlean(model)


@contextmanager
def kept_config(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer turns the cache off in the model's config, where it would be saved, and leaves training mode on."""
    cache, training = getattr(model.config, "use_cache", None), model.training
    try:
        yield
    finally:
        if cache is not None:
            model.config.use_cache = cache
        model.train(training)
