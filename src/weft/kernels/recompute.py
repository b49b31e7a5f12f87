"""Tensors that autograd does not keep, because they are cheap to make again from others that it keeps anyway.

`recompute(f, inputs)` is f(*inputs), with only the inputs saved. Its output remembers where it came from, so that an
operation of ours that would save it (`linear` of `weft.kernels.lean_linear`) saves those same inputs instead: a
norm's output costs nothing beside the residual stream, SiLU(gate) * up nothing beside gate and up. In backward the
tensor is made once, by whoever needs it first, and freed by the last.

Chen et al., 2016, arXiv 1604.06174, restricted to functions whose recomputation is a few element-wise passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Source", "changes", "fetch", "recompute", "source_of"]

_SOURCE = "_weft_source"


class Recipe:
    """A function of tensors, the autocast state it was first run in, and its result while a backward pass needs it."""

    def __init__(self, function: Callable[..., Tensor], device_type: str) -> None:
        self.function, self.device_type = function, device_type
        self.narrow = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        self.made: tuple[tuple[Tensor, ...], Tensor] | None = None  # leaves and the output that hangs on them

    def make(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The leaves and the output of f, with a graph between them; one run a backward pass."""
        if self.made is None:
            leaves = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in inputs)
            with torch.enable_grad(), self.autocast():
                self.made = leaves, self.function(*leaves)
        return self.made

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast state of the forward pass. Its cache would hand out casts of another grad mode."""
        return torch.autocast(self.device_type, dtype=self.narrow, enabled=self.narrow is not None, cache_enabled=False)


class Source(NamedTuple):
    """What is kept in a tensor's place: the tensors it is made from, and how (None: it is the one tensor itself)."""

    recipe: Recipe | None
    tensors: tuple[Tensor, ...]
    version: int


def changes(x: Tensor) -> int:
    """How often a tensor was changed in place; 0 of one made in `torch.inference_mode`, which does not count them."""
    return 0 if x.is_inference() else x._version


def source_of(x: Tensor) -> Source:
    """What to save in place of `x`: its inputs if it is an untouched output of `recompute`, else itself."""
    source: Source | None = getattr(x, _SOURCE, None)
    # changed in place since: its inputs no longer make it
    return source if source is not None and source.version == changes(x) else Source(None, (x,), changes(x))


def fetch(recipe: Recipe | None, tensors: Sequence[Tensor]) -> Tensor:
    """The tensor of a source, in backward."""
    return tensors[0] if recipe is None else recipe.make(tensors)[1].detach()


def recompute(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter] = ()
) -> Tensor:
    """function(*inputs), keeping only `inputs` for the backward pass.

    Args:
        function: deterministic, without in-place changes; it may close over `parameters`, which must all be named.
        inputs: the tensors it is a function of.
        parameters: trained tensors it reads beside its inputs; they receive gradients.
    """
    recipe = Recipe(function, inputs[0].device.type)
    trained = tuple(p for p in parameters if p.requires_grad)
    output: Tensor = _Recompute.apply(recipe, len(inputs), *inputs, *trained)  # type: ignore[no-untyped-call]
    setattr(output, _SOURCE, Source(recipe, tuple(t.detach() for t in inputs), changes(output)))
    return output


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, count: int, *tensors: Tensor) -> Tensor:
        inputs, ctx.parameters = tensors[:count], tensors[count:]
        ctx.recipe = recipe
        ctx.save_for_backward(*inputs)
        with recipe.autocast():
            return recipe.function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves, output = ctx.recipe.make(ctx.saved_tensors)
        ctx.recipe.made = None  # the last to need it: consumers ran before
        wanted = [*leaves, *ctx.parameters]
        needed = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        grads: list[Tensor | None] = [None] * len(wanted)
        for i, g in zip(
            needed, torch.autograd.grad(output, [wanted[i] for i in needed], grad, allow_unused=True), strict=True
        ):
            grads[i] = g
        return None, None, *grads
