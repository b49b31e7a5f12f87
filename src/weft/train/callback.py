"""Rules around the steps of a transformers Trainer: one callback, which also keeps their state in the Trainer's
checkpoints.

    Trainer(..., callbacks=[RuleCallback(rules)])         any Trainer: start, before_step, after_step, checkpoints
    weft.train.trainer.Trainer                            also the penalty, which has to enter the loss

In a checkpoint, `weft_rules.safetensors` holds the tensors and, as JSON in its metadata, the numbers. It is written
last, so its presence says that the checkpoint is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weft.errors import WeftError
from weft.files import replacing
from weft.rules import Rule, State
from weft.rules.sharded import sharded_like, whole
from weft.tensors import read_metadata, read_tensors

__all__ = ["RULES_FILE", "RuleCallback", "load_rule_state", "save_rule_state"]

RULES_FILE = "weft_rules.safetensors"


class RuleCallback(TrainerCallback):
    """Runs a rule (or `Rules`) around each optimizer step, and saves and restores its state with the Trainer's
    checkpoints.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rule.start(kwargs["model"], steps=state.max_steps)
        if state.global_step > 0:
            self.rule.load_state_dict(load_rule_state(checkpoint(args, state), kwargs["model"]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rule.before_step(kwargs["model"], state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rule.after_step(kwargs["model"], state.global_step + 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        save_rule_state(self.rule, checkpoint(args, state), write=state.is_world_process_zero)


def checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer saves, and has resumed from, the checkpoint of this step."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def save_rule_state(rule: Rule, directory: Path, write: bool = True) -> None:
    """Write the rule's state into a checkpoint, as a whole or not at all. Where a model is sharded, call it on every
    process, and `write` on one.
    """
    state = rule.state_dict()
    spread = [name for name, value in state.items() if isinstance(value, DTensor)]
    tensors = {name: whole(value.detach()).contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    if not write:
        return
    numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    with replacing(directory / RULES_FILE) as temporary:
        save_file(tensors, temporary, metadata={"numbers": json.dumps(numbers), "spread": json.dumps(spread)})


def load_rule_state(directory: Path, model: nn.Module | None = None) -> State:
    """The state that `save_rule_state` wrote, spread as it was over the processes of a sharded model. Raises WeftError
    when there is none.
    """
    path = directory / RULES_FILE
    if not path.is_file():
        raise WeftError(f"{directory} has no {RULES_FILE}, so training with rules cannot go on from it: start it anew.")
    told, tensors = read_metadata(path), read_tensors(path)
    like = next((p for p in model.parameters() if isinstance(p, DTensor)), None) if model is not None else None
    if like is not None:
        tensors |= {
            name: sharded_like(tensors[name].to(like.device), like) for name in json.loads(told.get("spread", "[]"))
        }
    return {**json.loads(told.get("numbers", "{}")), **tensors}
