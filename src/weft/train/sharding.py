"""A model's weights, gradients and optimizer state spread over the processes of a run: FSDP2, torch's `fully_shard` of
each block and of the rest.

Its checkpoints are those of one process, whole tensors under the same names, so that a run goes on with another number
of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.rules.sharded import sharded_like, whole
from weft.terms.layers import block_stacks
from weft.train.recipe import Recipe

__all__ = [
    "SHARDED_FILE", "asked_to_shard", "is_sharded", "regather", "reshard", "rows_a_step", "sharded",
]  # fmt: skip

SHARDED_FILE = "weft_sharded.json"
"""Beside a checkpoint's optimizer state: which of its tensors were spread, as [parameter, name]."""


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def asked_to_shard(wanted: bool) -> bool:
    """Whether a run is sharded: because it is `wanted`, or launched with accelerate's FSDP, which is then turned off;
    models are sharded here, before their optimizers are made, on any device.

    Raises:
        WeftError: there is one process to spread a model over.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        wanted, os.environ["ACCELERATE_USE_FSDP"] = True, "false"
    if wanted and _processes() == 1:
        raise WeftError(
            "--shard spreads a model over processes, and there is one: torchrun --nproc-per-node N -m weft pretrain ..."
        )
    return wanted


def rows_a_step(recipe: Recipe) -> dict[str, int]:
    """The recipe's batch and accumulation as those of one process, which decide what a step does."""
    return {"batch": recipe.batch * recipe.accumulate * _processes(), "accumulate": 1}


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def sharded(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the block, the parameters are this process's rows of them; after it, whole again on every process, but
    for an error, which leaves them spread.

    Make the optimizer within the block. The model must be the same on all processes.
    """
    if not wanted:
        yield
        return
    device = next(model.parameters()).device.type
    PartialState(cpu=device == "cpu")  # the process group, as the Trainer will look for it
    shells = [(module, type(module), _copied(vars(module))) for module in model.modules()]
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in (block for stack in block_stacks(model).values() for block in stack):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    yield
    _restore(shells)  # not after an error, which may be of one process alone: the others would be waited for
    dist.barrier()  # no process goes on while another still waits for its rows


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's attributes, its tables of hooks and parameters copied."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in state.items()}


@torch.no_grad()
def _restore(shells: list[tuple[nn.Module, type, dict[str, Any]]]) -> None:
    """Modules as they were, with the parameters that they have now, whole."""
    made: dict[Tensor, nn.Parameter] = {}  # a tied parameter is made once
    for module, cls, state in shells:
        now = {name: p for name, p in module._parameters.items() if p is not None}
        for p in now.values():
            if p not in made:
                made[p] = nn.Parameter(whole(p.detach()), p.requires_grad) if isinstance(p, DTensor) else p
        tables: dict[str, Any] = {"_parameters": {**state["_parameters"], **{name: made[p] for name, p in now.items()}}}
        tables |= {"_buffers": module._buffers, "_modules": module._modules, "training": module.training}
        module.__class__ = cls
        vars(module).clear()
        vars(module).update(state | tables)


def regather(state: dict[str, Any]) -> tuple[dict[str, Any], list[list[Any]]]:
    """An optimizer's state dictionary, its tensors whole and on the CPU, and which were spread. It communicates."""
    spread: list[list[Any]] = []
    found: dict[Any, Any] = {}
    for parameter, of_one in state["state"].items():
        found[parameter] = {}
        for name, value in of_one.items():
            if isinstance(value, DTensor):
                spread.append([parameter, name])
            found[parameter][name] = whole(value).cpu() if isinstance(value, Tensor) else value
    return {**state, "state": found}, spread


def reshard(state: dict[str, Any], optimizer: torch.optim.Optimizer, directory: Path) -> dict[str, Any]:
    """A whole state dictionary of a checkpoint, spread as the optimizer's parameters are.

    Raises:
        WeftError: one process wrote it, and of a tensor it cannot be told whether its rows are the parameter's.
    """
    note = directory / SHARDED_FILE
    spread = {tuple(pair) for pair in json.loads(note.read_text(encoding="utf-8"))} if note.is_file() else None
    numbers = (number for group in state["param_groups"] for number in group["params"])
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    placed: dict[Any, Any] = dict(state["state"])
    for number, p in zip(numbers, parameters, strict=True):
        if number in placed and isinstance(p, DTensor):
            placed[number] = {
                name: sharded_like(value.to(p.device), p) if _spread(spread, number, name, value, p) else value
                for name, value in placed[number].items()
            }
    return {**state, "state": placed}


def _spread(spread: set[Any] | None, number: Any, name: str, value: Any, p: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return False
    if spread is not None:
        return (number, name) in spread
    if value.shape == p.shape:
        return True
    if value.dim() and value.shape[0] == p.shape[0]:
        raise WeftError(
            "This checkpoint is of one process, and its optimizer's state is not the weights' shape: go on with one."
        )
    return False
