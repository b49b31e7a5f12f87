"""What a training step would hold, without one: the step is run on tensors without values, and what is alive counted.

It is the very step that training takes (its lean forward, its terms, its optimizer), so nothing here knows a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from weft.errors import WeftError
from weft.memory import lean
from weft.memory.live import Live
from weft.plan.layers import Held, Stepped, few, held, stepped
from weft.plan.supposed import Supposed, unmasked
from weft.train.modes import checkpointing, in_half
from weft.train.recipe import Recipe

__all__ = ["planned", "step_bytes"]


def planned(
    model: nn.Module,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    recipe: Recipe,
    device: torch.device | str = "cpu",
    *,
    by_block: bool = True,
) -> dict[str, Any]:
    """The bytes of a step of this model, which has no storage and is of no use afterwards; see `step_bytes`.

    Args:
        make: the optimizer of a model.
        by_block: of equal blocks run a few alone (`weft.plan.layers`), with which the model is left; not where there is
            more of each block than the block.
    """
    model.train()
    if recipe.lean:
        lean(model)
    parameters = sum(p.numel() for p in model.parameters())
    own = _own_plan(make(model))
    layers = few(model) if by_block else None
    remade = checkpointing(model, recipe.checkpointing)  # type: ignore[arg-type]
    with remade, FakeTensorMode(allow_non_fake_inputs=True), Supposed(), unmasked():
        model.to_empty(device=device)
        if isinstance(model, PreTrainedModel):
            model.tie_weights()
        ids = torch.zeros(recipe.batch, recipe.window, dtype=torch.long, device=device)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        narrow = torch.autocast(ids.device.type, torch.bfloat16, enabled=in_half(model, recipe))
        first, second = (_held(model, narrow, inputs, layers) for _ in range(2))
        step = _stepped(model, make, layers) if own is None else Stepped(own, 0)
    kept = first.gradients - second.gradients  # by layers, from the first step on
    weights = second.weights + ids.nbytes
    peak = max(second.peak, weights + second.gradients + step.workspace) + step.state + kept
    return {"parameters": parameters} | _named(weights + kept, second.gradients, step.state, second.activations, peak)


def step_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> dict[str, Any]:
    """The bytes of the second of two steps: weights (with buffers, and what layers keep from the first step on),
    gradients, moments (the optimizer's state), activations (what the forward pass leaves for the backward pass), peak
    (all that is alive at the same time), and workspace, what of the peak the others leave: none where they are never
    all alive at once, and their sum is above the peak.

    A subspace optimizer's own workspace within its step is not counted, its state is. Memory that kernels use for
    themselves, and an allocator's waste, are not seen.
    """
    of_state = _own_plan(optimizer)
    activations = gradients = 0
    with Live() as live:
        weights = live.count([*model.parameters(), *model.buffers(), ids])
        for first in (True, False):
            start, live.peak = live.now, live.now
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            activations = live.now - start
            loss.backward()
            del loss
            if first:
                weights += live.now - start - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            gradients = live.now - start
            if of_state is None:
                optimizer.step()
            optimizer.zero_grad()
        moments = live.now - weights if of_state is None else of_state
        peak = live.peak + (of_state or 0)
    return _named(weights, gradients, moments, activations, peak)


def _named(weights: int, gradients: int, moments: int, activations: int, peak: int) -> dict[str, int]:
    workspace = max(0, peak - weights - gradients - moments - activations)
    parts = (weights, gradients, moments, activations, workspace, peak)
    names = ("weights", "gradients", "moments", "activations", "workspace", "peak")
    return {f"{name}_bytes": part for name, part in zip(names, parts, strict=True)}


def _own_plan(optimizer: torch.optim.Optimizer) -> int | None:
    """The bytes of state that an optimizer whose step asks for values says itself."""
    plans = getattr(optimizer, "planned_bytes", None)
    return None if plans is None else int(plans())


class _LossAlone(nn.Module):
    """A model of whose output nothing but the loss is kept, its forward pass within a context."""

    def __init__(self, model: nn.Module, within: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.model, self.within = model, within

    def forward(self, **inputs: Any) -> Any:
        with self.within:
            return SimpleNamespace(loss=self.model(**inputs).loss)


def _held(model: nn.Module, within: Any, inputs: Mapping[str, Any], layers: int | None) -> Held:
    found = held(_LossAlone(model, within), inputs, layers)
    if found is None:
        raise WeftError(
            "The memory of this model cannot be planned, for its blocks do not follow one another; measure a step with "
            "--dry-run."
        )
    return found


def _stepped(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], layers: int | None) -> Stepped:
    try:
        return stepped(model, make, layers)
    except RuntimeError as error:  # it asks for the value of a tensor that has none
        name = type(make(model)).__name__
        raise WeftError(
            f"The memory of {name} cannot be planned, for its step depends on values; choose another optimizer, or "
            "measure a step with --dry-run."
        ) from error
