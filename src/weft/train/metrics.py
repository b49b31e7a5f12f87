"""`metrics.jsonl`: what the Trainer logs, one JSON object a line, continued where a resumed run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weft.errors import WeftError
from weft.optim.state import state_bytes
from weft.progress import say

__all__ = ["MetricsLog", "OneStep"]


class MetricsLog(TrainerCallback):
    """Appends every log record to a file, and ends a run whose loss is no number before it is saved.

    Args:
        path: lines of steps after the one that training starts from are dropped.
        more: learning rate -> further figures for each record that has one, such as scale * lr of adapters.
        measure: figures to write every `every` steps.
    """

    def __init__(
        self,
        path: Path,
        more: Callable[[float], Mapping[str, float]] = lambda lr: {},
        measure: Callable[[], Mapping[str, float]] | None = None,
        every: int | None = None,
    ) -> None:
        self.path, self.more, self.measure, self.every = path, more, measure, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            kept = [line for line in self.records() if line["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise WeftError(f"The loss is not finite at step {state.global_step}: lower --lr, or raise --warmup.")
        if state.is_world_process_zero and logs:
            more = self.more(logs["learning_rate"]) if "learning_rate" in logs else {}
            self.append({"step": state.global_step, **logs, **more})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.measure is not None and self.every is not None and state.global_step % self.every == 0:
            measured = self.measure()
            if state.is_world_process_zero:
                self.append({"step": state.global_step, **measured})
                say(f"step {state.global_step:,}: " + ", ".join(f"{key} {x:.4g}" for key, x in measured.items()))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines written so far; a last line cut short by a kill is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]


class OneStep(TrainerCallback):
    """Ends training after a step, and notes how many bytes the optimizer's state then takes."""

    bytes: int = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bytes = state_bytes(kwargs["optimizer"])
        control.should_training_stop = True
