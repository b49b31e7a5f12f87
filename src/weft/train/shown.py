"""What a training run shows while it runs: a bar on a terminal, a line with the loss now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weft.progress import Bar, say

__all__ = ["Progress"]

SHOWN = {"loss": "loss", "eval_loss": "evaluation loss"}


class Progress(TrainerCallback):
    """Steps done, time left, the last losses; first, how many processes train on how many rows a step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        processes = f"{args.world_size} processes" if args.world_size > 1 else "one process"
        begin = f"from step {state.global_step} on, " if state.global_step else ""
        say(f"Training {state.max_steps} steps, {begin}{rows} rows a step, in {processes}.")
        self.bar = Bar("train", state.max_steps, state.global_step)
        self.figures: dict[str, str] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        found = {word: f"{word} {logs[key]:.3f}" for key, word in SHOWN.items() if key in (logs or {})}  # type: ignore[index]
        if found:
            self.figures |= found
            last = state.global_step >= state.max_steps
            self.bar.tell(", ".join(self.figures.values()), soon=True, now=last or SHOWN["eval_loss"] in found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
