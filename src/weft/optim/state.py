"""Optimizer state that survives a checkpoint unchanged: counting its bytes, and loading it without torch's cast.

`torch.optim.Optimizer.load_state_dict` casts every state tensor to its parameter's dtype: fp32 moments of bf16
weights lose two thirds of their digits, and integer indices become floats. `restore` keeps dtypes, so that a resumed
run follows the uninterrupted one bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.optim.distributed import local

__all__ = ["followed", "restore", "state_bytes", "tensor_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that this process holds in tensors of the optimizer's state (not in weights or gradients)."""
    return tensor_bytes(*optimizer.state.values())


def tensor_bytes(*states: Mapping[str, Any]) -> int:
    """Bytes that this process holds in the tensors of these states."""
    return sum(t.numel() * t.element_size() for state in states for t in map(local, _tensors(state)))


def restore(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """`Optimizer.load_state_dict`, with every state tensor in the dtype it was saved in, on its parameter's device.

    Raises WeftError when the groups of the saved optimizer are not those of this one, in number, in size, or in
    hyperparameters.
    """
    _check_groups(optimizer, state_dict)
    torch.optim.Optimizer.load_state_dict(optimizer, dict(state_dict))
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for saved_id, parameter in zip(saved_ids, parameters, strict=True):
        if saved_id in state_dict["state"]:
            optimizer.state[parameter] = _copy(state_dict["state"][saved_id], parameter.device)


def _check_groups(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    name = type(optimizer).__name__
    if not {"state", "param_groups"} <= set(state_dict):
        raise WeftError(
            f"This is not an optimizer's state_dict (it has no 'state' and 'param_groups'); {name} cannot load it."
        )
    saved, own = state_dict["param_groups"], optimizer.param_groups
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
        raise WeftError(
            f"The state_dict has parameter groups of {[len(g['params']) for g in saved]} tensors, this {name} of "
            f"{[len(g['params']) for g in own]}; build the optimizer on the same model and groups as the saved one."
        )
    for theirs, ours in zip(saved, own, strict=True):
        missing = sorted(set(ours) - set(theirs))
        if missing:
            raise WeftError(
                f"The state_dict comes from another optimizer: its groups lack {missing[0]!r}, which {name} needs; "
                f"load a state_dict that {name} saved."
            )


def _copy(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {k: _copy(v, device) for k, v in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def followed(master: Tensor, weight: Tensor) -> Tensor:
    """The wider copy of a weight, but the weight where others than the optimizer wrote into it, such as a rule."""
    return torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype))
