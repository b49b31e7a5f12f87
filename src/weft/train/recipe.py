"""The recipe of a training run: how many steps of what, as one checked record."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from weft.errors import WeftError, unknown

__all__ = ["REPORTS", "SCHEDULES", "Recipe"]

SCHEDULES = ("linear", "cosine", "constant")
REPORTS = {"none": "", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Tools that transformers can report to, and their packages."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Raises WeftError, when made, for what makes no sense.

    Args:
        steps: optimizer steps.
        lr: peak learning rate.
        window: tokens a row.
        batch: rows a process handles at once.
        accumulate: batches a step; a step sees batch * accumulate * processes rows.
        warmup: steps over which the learning rate rises from 0.
        schedule: how it falls to 0 afterwards; "constant" does not.
        weight_decay: decoupled, on matrices only.
        clip: largest gradient norm; 0 for no limit.
        save_every: steps between checkpoints; None for a tenth of the steps, or those of `eval_every` with `load_best`.
        save_total_limit: how many checkpoints are kept, the best one on top; 2 at least keep one while the next is
            written.
        log_every: steps between log lines.
        eval_every: steps between evaluations; None for none but at the ends where there is a text, and for as often as
            checkpoints where there are rows to judge by.
        load_best: end with the weights of the checkpoint of the least evaluation loss.
        early_stopping: end after so many evaluations in a row without a lower loss.
        report_to: also log to "tensorboard", "wandb" or "mlflow", through transformers.
        lean: keep fewer activations and no logits for the backward pass, with the same gradients (`weft.lean`).
        checkpointing: recompute activations in the backward pass instead of keeping them.
        autocast: compute in bf16 where the weights are wider; None where there is a GPU or a half-precision weight.
        bos: whether texts, and windows cut out of them, begin with the beginning-of-text token; None for what the
            tokenizer itself puts in front of a text.
        seed: of the order of data and of dropout; both depend on nothing but the seed and the step.
    """

    steps: int = 200
    lr: float = 1e-4
    window: int = 512
    batch: int = 4
    accumulate: int = 1
    warmup: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int | None = None
    save_total_limit: int = 2
    log_every: int = 10
    eval_every: int | None = None
    load_best: bool = False
    early_stopping: int | None = None
    report_to: str = "none"
    lean: bool = True
    checkpointing: bool = False
    autocast: bool | None = None
    bos: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_total_limit"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_every", "eval_every", "early_stopping"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("window", self.window, 2)
        for name in ("weight_decay", "clip"):
            _at_least(name, getattr(self, name), 0)
        if not 0 < self.lr < float("inf"):
            raise WeftError(f"--lr is {self.lr}: give a learning rate above 0, such as 1e-4.")
        if not 0 <= self.warmup <= self.steps:
            raise WeftError(f"--warmup is {self.warmup}: give a number of steps from 0 to --steps, {self.steps}.")
        if self.schedule not in SCHEDULES:
            raise unknown("learning-rate schedule", self.schedule, SCHEDULES)
        if self.load_best and self.saving_steps != self.judging_steps:
            raise WeftError(
                f"--load-best takes the best checkpoint, and --save-every {self.saving_steps} does not save where "
                f"--eval-every {self.judging_steps} judges: give both the same, or --eval-every alone."
            )
        if self.report_to not in REPORTS:
            raise unknown("tool to report to", self.report_to, REPORTS)
        if REPORTS[self.report_to] and importlib.util.find_spec(REPORTS[self.report_to]) is None:
            raise WeftError(f"--report-to {self.report_to} needs its package: pip install {REPORTS[self.report_to]}.")
        if not 0 <= self.seed < 2**32:
            raise WeftError(f"--seed is {self.seed}: give a number from 0 to {2**32 - 1}.")

    @property
    def saving_steps(self) -> int:
        """Steps between checkpoints."""
        if self.load_best and self.save_every is None and self.eval_every is not None:
            return self.eval_every
        return self.save_every or max(1, self.steps // 10)

    @property
    def judging_steps(self) -> int:
        """Steps between evaluations of rows."""
        return self.eval_every or self.save_every or max(1, self.steps // 10)


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise WeftError(f"--{name.replace('_', '-')} is {value}: give at least {least}.")
