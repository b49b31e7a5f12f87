"""Reading losses from a user's closure: with the same randomness each time, checked, averaged over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.errors import WeftError

__all__ = ["average", "loss_of", "steady"]


def average(losses: Tensor, device: torch.device) -> Tensor:
    """The mean over the processes of losses (a few numbers on the CPU), summed on `device`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return losses
    total = losses.to(device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).cpu()


def loss_of(closure: Callable[[], Any], again: Callable[[], None]) -> float:
    """The closure's loss, after `again` has rewound the random numbers. Raises WeftError when it is no fp32 scalar."""
    again()
    try:
        loss = closure()
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise WeftError(
                "The closure calls backward; zeroth-order training only needs the loss returned."
            ) from error
        raise
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise WeftError(f"The closure must return one loss; it returned a tensor of shape {tuple(loss.shape)}.")
        if loss.dtype in (torch.bfloat16, torch.float16):
            raise WeftError(
                f"The loss is {loss.dtype}, too coarse for differences between losses; compute it in fp32 "
                "(logits.float())."
            )
    try:
        return float(loss)
    except TypeError as error:
        raise WeftError(f"The closure must return the loss; it returned {type(loss).__name__}.") from error


@contextmanager
def steady(model: nn.Module | None, parameters: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Eval mode inside; gives a function that rewinds the random numbers, so that all evaluations see the same."""
    training = [module for module in model.modules() if module.training] if model is not None else []
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    cpu, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    def again() -> None:
        torch.set_rng_state(cpu)
        for device, state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    for module in training:
        module.training = False
    try:
        yield again
    finally:
        for module in training:
            module.training = True
