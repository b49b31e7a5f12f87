"""What a training step would hold, without one: the step is run on tensors without values, and what is alive counted.

It is the very step that training takes (its lean forward, its terms, its optimizer), so nothing here knows a method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.errors import WeftError
from weft.memory import lean
from weft.memory.live import Live
from weft.plan.supposed import Supposed, unmasked
from weft.train.recipe import Recipe

__all__ = ["planned", "step_bytes"]


def planned(
    model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], recipe: Recipe, device: str = "cpu"
) -> dict[str, Any]:
    """The bytes of a step of this model, which has no storage and is of no use afterwards; see `step_bytes`.

    Args:
        make: the optimizer of a model.
    """
    model.train()
    if recipe.lean:
        lean(model)
    with FakeTensorMode(allow_non_fake_inputs=True), Supposed(), unmasked():
        model.to_empty(device=device)
        ids = torch.zeros(recipe.batch, recipe.window, dtype=torch.long, device=device)
        parameters = sum(p.numel() for p in model.parameters())
        return {"parameters": parameters, **step_bytes(model, make(model), ids)}


def step_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> dict[str, Any]:
    """The bytes of the second of two steps: weights (with buffers, and what layers keep from the first step on),
    gradients, moments (the optimizer's state), activations (what the forward pass leaves for the backward pass), peak
    (all that is alive at the same time), and workspace, the rest: below zero where the others are never all alive at
    once.

    A subspace optimizer's own workspace within its step is not counted, its state is. Memory that kernels use for
    themselves, and an allocator's waste, are not seen.
    """
    plans = getattr(optimizer, "planned_bytes", None)  # of one whose step asks for values
    of_state: int | None = None if plans is None else plans()
    found: dict[str, Any] = {}
    with Live() as live:
        weights = live.count([*model.parameters(), *model.buffers(), ids])
        for first in (True, False):
            start, live.peak = live.now, live.now
            loss = model(input_ids=ids, labels=ids).loss
            found["activations_bytes"] = live.now - start
            loss.backward()
            del loss
            if first:
                weights += live.now - start - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            found["gradients_bytes"] = live.now - start
            _step(optimizer, of_state is None)
            optimizer.zero_grad()
        moments = live.now - weights if of_state is None else of_state
        peak = live.peak + (of_state or 0)
    found |= {"weights_bytes": weights, "moments_bytes": moments, "peak_bytes": peak}
    parts = ("weights_bytes", "gradients_bytes", "moments_bytes", "activations_bytes")
    ordered = {name: found[name] for name in parts}
    return ordered | {"workspace_bytes": peak - sum(ordered.values()), "peak_bytes": peak}


def _step(optimizer: torch.optim.Optimizer, wanted: bool) -> None:
    if not wanted:
        return
    try:
        optimizer.step()
    except RuntimeError as error:  # it asks for the value of a tensor that has none
        name = type(optimizer).__name__
        raise WeftError(
            f"The memory of {name} cannot be planned, for its step depends on values; choose another optimizer, or "
            "measure a step with --dry-run."
        ) from error
