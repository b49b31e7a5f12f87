"""What a model is like while it trains: wide parameters, activations that are computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.train.recipe import Recipe

__all__ = ["HALF", "checkpointing", "in_half", "wide"]

HALF = (torch.float16, torch.bfloat16)


def in_half(model: nn.Module, recipe: Recipe) -> bool:
    """Whether products are computed in bf16: as the recipe says, or else on a GPU, and amid half-precision weights."""
    if recipe.autocast is not None:
        return recipe.autocast
    return any(p.is_cuda or p.dtype in HALF for p in model.parameters())


@contextmanager
def wide(model: nn.Module) -> Iterator[None]:
    """Trainable parameters in fp32 within the block: in half precision, updates smaller than its rounding would be
    lost.
    """
    narrow = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALF}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


@contextmanager
def checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Activation checkpointing within the block."""
    if not wanted:
        yield
        return
    _checkpointing(model, "enable")({"use_reentrant": False})
    # with frozen embeddings no input of the first block would require a gradient, and some models refuse then
    model.enable_input_require_grads()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.disable_input_require_grads()  # type: ignore[no-untyped-call]
        _checkpointing(model, "disable")()


def _checkpointing(model: PreTrainedModel, action: str) -> Callable[..., Any]:
    """The model's method under its name in this release of transformers."""
    new, old = f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}"
    found: Callable[..., Any] = getattr(model, new) if hasattr(model, new) else getattr(model, old)
    return found
