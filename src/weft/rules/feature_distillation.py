"""FeatureDistillation and Perturbation: a compressed model stays near the one that it was made of (PELA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.features import Features, inner
from weft.rules.sharded import whole
from weft.terms import LowRank
from weft.terms.layers import weight_of

__all__ = ["FeatureDistillation", "Perturbation"]


class FeatureDistillation(Features):
    """Adds alpha times the mean over the blocks of MSE(their output, that of the original on the same input) to the
    loss (Guo et al., 2023, arXiv 2310.10700).

    Args:
        original: the model as it was, frozen; it runs beside the trained one, without gradients.
        alpha: the weight; 0 leaves the original out of the steps.
        relative: count each block's error relative to the mean square of the original's output there.
    """

    uncounted = "the model that it goes on with"

    def __init__(self, original: nn.Module | None, alpha: float, relative: bool) -> None:
        super().__init__(_given(original), alpha)
        self.relative = relative

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        if self.weight:
            self.hang(inner(model).register_forward_pre_hook(self._run_original, with_kwargs=True))

    def error(self, mine: Tensor, theirs: Tensor) -> Tensor:
        error = (mine - theirs).square().mean()
        return error / theirs.square().mean() if self.relative else error

    @torch.no_grad()
    def _run_original(self, module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if module.training:
            inner(self.teacher)(*args, **{**named, "use_cache": False})


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
