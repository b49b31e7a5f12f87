"""Stopping between two steps: a signal lets the step under way finish and be saved (see `weft.signals`)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weft.signals import request, requested

__all__ = ["Interrupt"]


class Interrupt(TrainerCallback):
    """A callback that ends training with a checkpoint once a signal has come."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _anywhere(args):
            control.should_save = control.should_training_stop = True


def _anywhere(args: TrainingArguments) -> bool:
    """Whether a signal has reached any process: all must stop at the same step."""
    if args.world_size > 1:
        flag = torch.tensor(float(requested()), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag:
            request()
    return requested()
