"""Per-layer updates: each parameter is stepped, and its gradient freed, inside the backward pass (Lv et al. 2023,
LOMO).

The gradients of a model are then never all alive at once. What needs them all cannot work: clipping by the global norm
is refused. Gradient accumulation works when it is announced: the gradient is kept until the last micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.optim.lowrank import LowRank

__all__ = ["PerLayer"]


class PerLayer:
    """Makes a `LowRank` optimizer step each parameter in the backward pass.

        optimizer = weft.optim.galore(model, rank=128)
        layers = weft.optim.PerLayer(optimizer, accumulate=4)
        for micro_batch in ...: loss.backward()       # the fourth backward pass steps and frees
        optimizer.step()                              # ends the step: steps parameters that missed a micro-batch

    Args:
        optimizer: built on a model that is neither wrapped in DDP nor sharded.
        accumulate: backward passes a step. Divide the loss by it as ever.
        clip: a global gradient norm to clip to; refused with the reason (Fira and APOLLO limit growth by themselves).

    `optimizer.step()` must follow every `accumulate` backward passes, as in any loop; a further backward pass before it
    raises WeftError instead of applying a micro-batch as if it were a batch. Weights agree with the ordinary step's to
    rounding. `remove()` undoes it.
    """

    def __init__(self, optimizer: LowRank, accumulate: int = 1, clip: float | None = None) -> None:
        if clip:
            raise WeftError(
                "Clipping by the global norm needs all gradients at once, and per-layer updates free each one early; "
                "set the clipping norm to 0, or do not update per layer."
            )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise WeftError("Per-layer updates run before gradients are averaged over processes; use one process.")
        if optimizer.nonfinite == "skip":
            raise WeftError(
                'nonfinite="skip" leaves a whole step out, which per-layer updates cannot undo; use "raise".'
            )
        if accumulate < 1:
            raise WeftError(f"accumulate is {accumulate}; it is a number of backward passes, 1 or more.")
        self.optimizer, self.accumulate = optimizer, accumulate
        self._passes: dict[Tensor, int] = {}
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(self._arrived)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Back to ordinary steps."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrived(self, parameter: Tensor) -> None:
        """The hook: a gradient has been accumulated."""
        passes = self._passes.get(parameter, 0) + 1
        if passes > self.accumulate:
            raise WeftError(
                f"A parameter received its {passes}th gradient before optimizer.step() was called, with "
                f"accumulate={self.accumulate}; give PerLayer the number of backward passes a step."
            )
        self._passes[parameter] = passes
        if passes == self.accumulate:
            self.optimizer.step_one(parameter)
            parameter.grad = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure: Callable[[], Any] | None = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is not None:
            raise WeftError("Per-layer updates happen in the backward pass, so step() takes no closure.")

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for parameter in self._passes:
            parameter.grad = None  # what missed a micro-batch has been stepped just now
        self._passes.clear()
