"""Checkpoints of a training run: only what training has changed, and only those that are complete.

A checkpoint is the Trainer's own (optimizer, schedule, progress, random state) but for the weights:
`weft_weights.safetensors` holds the trainable parameters, the buffers, and those frozen parameters that something has
written to. The rest is in the model that the run started from.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weft.errors import WeftError
from weft.rules.sharded import sharded_like, whole
from weft.tensors import read_tensors
from weft.train.callback import RULES_FILE

__all__ = ["WEIGHTS_FILE", "Changes", "last_checkpoint"]

WEIGHTS_FILE = "weft_weights.safetensors"


class Changes:
    """What training changes in a model, saved into and loaded from checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        """Call this before the first step, with the model on its device."""
        self.model = model
        self.versions = {name: p._version for name, p in model.named_parameters() if not p.requires_grad}

    def save(self, directory: Path, write: bool = True) -> None:
        """Write the changed tensors, whole. Of a sharded model, call it on every process, with `write` on one."""
        tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in self.changed().items()}
        if not write:
            return
        # one file may not name one storage twice, and a buffer may be a view of a parameter
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)

    def changed(self) -> dict[str, Tensor]:
        """Trainable parameters, saved buffers that are not empty, and frozen parameters written to since the start."""
        parameters = dict(self.model.named_parameters())
        saved = self.model.state_dict(keep_vars=True)
        buffers = {name: b for name, b in self.model.named_buffers() if name in saved and b.numel()}
        return {n: p for n, p in parameters.items() if self.versions.get(n) != p._version} | buffers

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Put the saved tensors in place, each with its saved shape; buffers that are not there were empty.

        Raises WeftError for a tensor that the model lacks.
        """
        here = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        found = read_tensors(directory / WEIGHTS_FILE)
        for name in self.changed().keys() - found.keys() - dict(self.model.named_parameters()).keys():
            here[name].data = here[name].new_empty(0)
        for name, saved in found.items():
            if name not in here:
                raise WeftError(
                    f"The checkpoint {directory} holds {name}, which the model has not: it is another model's."
                )
            if isinstance(here[name], DTensor):
                here[name].copy_(sharded_like(saved.to(here[name].device), here[name]))
            else:
                here[name].data = saved.to(here[name])
            self.versions.pop(name, None)


def last_checkpoint(directory: Path) -> Path | None:
    """The latest complete checkpoint, or None; incomplete ones, left by a process that was killed while saving, are
    removed.
    """
    complete: dict[int, Path] = {}
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if (path / RULES_FILE).is_file() and step.isdigit():  # written last
            complete[int(step)] = path
        else:
            shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too
    return complete[max(complete)] if complete else None
