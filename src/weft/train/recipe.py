"""The recipe of a training run: how many steps of what, as one checked record."""

from __future__ import annotations

from dataclasses import dataclass

from weft.errors import WeftError, unknown

__all__ = ["SCHEDULES", "Recipe"]

SCHEDULES = ("linear", "cosine", "constant")


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
        save_every: steps between checkpoints; None for a tenth of the steps.
        log_every: steps between log lines.
        eval_every: steps between evaluations, where there is a text to evaluate on; None for none but at the ends.
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
    log_every: int = 10
    eval_every: int | None = None
    lean: bool = True
    checkpointing: bool = False
    autocast: bool | None = None
    bos: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_every", "eval_every"):
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
        if not 0 <= self.seed < 2**32:
            raise WeftError(f"--seed is {self.seed}: give a number from 0 to {2**32 - 1}.")

    @property
    def saving_steps(self) -> int:
        """Steps between checkpoints."""
        return self.save_every or max(1, self.steps // 10)


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise WeftError(f"--{name.replace('_', '-')} is {value}: give at least {least}.")
