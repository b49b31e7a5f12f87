"""FeatureDistillation and Perturbation: a compressed model stays near the one that it was made of (PELA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.sharded import whole
from weft.terms import LowRank
from weft.terms.layers import block_stacks, weight_of

__all__ = ["FeatureDistillation", "Perturbation"]


class FeatureDistillation(Rule):
    """Adds alpha times the mean over the blocks of MSE(their output, that of the original on the same input) to the
    loss (Guo et al., 2023, arXiv 2310.10700).

    Args:
        original: the model as it was, frozen; it runs beside the trained one, without gradients.
        alpha: the weight; 0 leaves the original out of the steps.
        relative: count each block's error relative to the mean square of the original's output there.
    """

    uncounted = "the model that it goes on with"

    def __init__(self, original: nn.Module | None, alpha: float, relative: bool) -> None:
        self.original, self.alpha, self.relative = _given(original), alpha, relative
        self.handles: list[RemovableHandle] = []
        self.mask: Tensor | None = None  # of the tokens that are no padding
        self.mine: dict[str, Tensor] = {}
        self.theirs: dict[str, Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        self._close()
        if not self.alpha:
            return
        self.inner = _inner(self.original)
        self.handles.append(_inner(model).register_forward_pre_hook(self._run_original, with_kwargs=True))
        for whose, features in ((model, self.mine), (self.original, self.theirs)):
            for name, block in _blocks(whose):
                self.handles.append(block.register_forward_hook(_keep(name, features)))

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Of the forward pass just done, once."""
        if not self.mine or not self.theirs:
            return None
        errors = [self._error(self.mine[name].float(), theirs.float()) for name, theirs in self.theirs.items()]
        self.mine.clear()
        self.theirs.clear()
        return self.alpha * torch.stack(errors).mean()

    def _error(self, mine: Tensor, theirs: Tensor) -> Tensor:
        if self.mask is not None and self.mask.shape == mine.shape[:-1]:
            mine, theirs = mine[self.mask.bool()], theirs[self.mask.bool()]
        error = (mine - theirs).square().mean()
        return error / theirs.square().mean() if self.relative else error

    def after_step(self, model: nn.Module, step: int) -> None:
        if step == self.steps:
            self._close()

    @torch.no_grad()
    def _run_original(self, module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.mine.clear()
        self.theirs.clear()
        self.mask = named.get("attention_mask")
        if module.training:
            self.inner(*args, **{**named, "use_cache": False})

    def _close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class Perturbation(Rule):
    """Adds beta times the mean over the factored matrices of (max |B A - W| - eps)^2 to the loss, W the original.

    A target, not a limit: below eps the error is pushed up.
    """

    works_on = (LowRank,)

    def __init__(self, original: nn.Module | None, beta: float, eps: float) -> None:
        self.original, self.beta, self.eps = _given(original), beta, eps

    def begin(self, model: nn.Module) -> None:
        self.pairs = [(term, self.original.get_submodule(layer)) for layer, term in self.found(LowRank)]

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.beta:
            return None
        return self.beta * torch.stack([(self._largest(*pair) - self.eps).square() for pair in self.pairs]).mean()

    def _largest(self, term: LowRank, layer: nn.Module) -> Tensor:
        B, A = (whole(factor) for factor in (term.B, term.A))
        B, A = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (B, A))
        return (term.scale * (B @ A) - weight_of(layer, B.dtype)).abs().max()


def _given(original: nn.Module | None) -> nn.Module:
    if original is None:
        raise WeftError("This method follows the model that it goes on with: give original=, a frozen copy of it.")
    return original


def _inner(model: nn.Module) -> nn.Module:
    """The model without its head, which is called with what both models are given."""
    inner = getattr(model, "base_model", model)
    assert isinstance(inner, nn.Module)
    return inner


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{i}", block) for name, stack in block_stacks(model).items() for i, block in enumerate(stack)]


def _keep(name: str, features: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training or not torch.is_grad_enabled():
            # a block that is recomputed for the backward pass has been seen
            features.setdefault(name, output[0] if isinstance(output, tuple) else output)

    return keep
