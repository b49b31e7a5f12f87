"""DensityPenalty: a smooth count of the MLPs' non-zero activations, added to the loss (DEFT), and the count itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.hooks import watch, watch_before
from weft.rules.scope import in_use
from weft.terms import Term
from weft.terms.adapters import unwrapped

__all__ = ["DensityPenalty", "activation_density", "activations", "smooth_density"]

_MASKS = ("attention_mask", "decoder_attention_mask")
_ACTIVATION = re.compile(r"gelu|relu|silu|swish|mish|laplace|activation", re.IGNORECASE)


class DensityPenalty(Rule):
    """Adds weight * mean over blocks, tokens and units of a^2 / (a^2 + eps) to the loss, for the activations a (tokens,
    units) inside the MLPs (Runwal et al., 2024, arXiv 2402.01911); encoder and decoder count apart, and add up.

    Positions that the attention mask leaves out do not count, and nothing counts while the scope's terms are not in
    use. Works beside any adapter, and with activation checkpointing that is not reentrant.
    """

    def __init__(self, weight: float, eps: float) -> None:
        if eps <= 0:
            raise WeftError(f"eps is {eps}: the square at which an activation counts half must be positive.")
        self.weight, self.eps = weight, eps

    def begin(self, model: nn.Module) -> None:
        if not self.weight:
            return
        whole = unwrapped(model)
        layer, term = self.all_terms()[0]
        assert isinstance(term, Term)
        self.recorder = _Recorder(whole.get_submodule(layer), term, self.eps)
        names = activations(whole)
        for name, module in names.items():
            self.hang(watch(module, _Activation(self.recorder, _mask_of(name, names))))
        self.hang(watch_before(whole, self.recorder))

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.weight:
            return None
        found = self.recorder.take()
        if not found:
            raise WeftError(
                "No MLP activation was seen in the last forward pass; use gradient checkpointing with "
                "use_reentrant=False, and call the model itself."
            )
        return self.weight * torch.stack([torch.stack(values).mean() for values in found.values()]).sum()


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """The activation modules of a model's blocks by name. Raises WeftError where there are none."""
    found = {
        name: module
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
        and _ACTIVATION.search(type(module).__name__)
        and any(part.isdigit() for part in name.split("."))
    }
    if not found:
        raise WeftError(
            f"The blocks of this {type(model).__name__} have no activation modules (GELU, ReLU, SiLU ...), whose "
            "density could be counted; choose another method."
        )
    return found


@torch.no_grad()
def activation_density(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], threshold: float = 0.0
) -> dict[str, float]:
    """The share of MLP activations with |a| > threshold, by activation module, over the tokens that the attention mask
    keeps; report the threshold with it.

    At 0 these are the activations that are not exactly zero, which for GELU depends on the dtype; SiLU is zero nowhere.
    Raises WeftError for a model without activation modules.
    """
    names = activations(model)
    counts = dict.fromkeys(names, torch.zeros(2, dtype=torch.float64))
    now: Mapping[str, Tensor] = {}

    def count(name: str, a: Tensor) -> None:
        kept = _token_weights(a, now.get(_mask_of(name, names)), normalise=False)
        dense = (a.abs() > threshold).double().mean(-1)
        counts[name] = counts[name] + torch.stack([(dense * kept).sum(), kept.double().sum()]).cpu()

    handles = [
        module.register_forward_hook(lambda module, args, a, name=name: count(name, a))
        for name, module in names.items()
    ]
    training = model.training
    try:
        model.eval()
        for now in batches:
            model(**now)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: float(dense / tokens) for name, (dense, tokens) in counts.items()}


def smooth_density(a: Tensor, eps: float, weights: Tensor) -> Tensor:
    """sum over tokens of weights * mean over units of a^2 / (a^2 + eps), in fp32; only a is kept for backward.

    a (..., units), weights (...) without a gradient.
    """
    density: Tensor = _SmoothDensity.apply(a, eps, weights)  # type: ignore[no-untyped-call]
    return density


class _SmoothDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, eps: float, weights: Tensor) -> Tensor:
        ctx.save_for_backward(a, weights)
        ctx.eps = eps
        squares = a.float().square()
        return ((squares / (squares + eps)).mean(-1) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, weights = ctx.saved_tensors
        wide = a.float()
        slope = wide * (2 * ctx.eps) / (wide.square() + ctx.eps).square()
        return (slope * (grad * weights / a.shape[-1]).unsqueeze(-1)).to(a.dtype), None, None


class _Recorder:
    """What the last forward pass of a model has shown; a pre-hook of the model, which begins anew with each pass."""

    def __init__(self, layer: nn.Module, term: Term, eps: float) -> None:
        self.layer, self.term, self.eps = layer, term, eps
        self.values: dict[str, list[Tensor]] = {}
        self.masks: dict[str, Any] = {}
        self.on = self.counting = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.on = self.counting = model.training and in_use(self.layer, self.term)
        self.values = {}
        self.masks = {key: kwargs.get(key) for key in _MASKS}

    def take(self) -> dict[str, list[Tensor]]:
        """The densities by mask, encoder's and decoder's; what checkpointing computes again later is not recorded."""
        self.counting = False
        values, self.values = self.values, {}
        return values


class _Activation:
    """A forward hook of an activation module."""

    def __init__(self, recorder: _Recorder, mask: str) -> None:
        self.recorder, self.mask, self.term = recorder, mask, recorder.term

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        a = output
        if not (self.recorder.on and module.training and a.requires_grad):
            return
        # a second pass of checkpointing must do what the first did, and so computes it too
        density = smooth_density(a, self.recorder.eps, _token_weights(a, self.recorder.masks[self.mask]))
        if self.recorder.counting:
            self.recorder.values.setdefault(self.mask, []).append(density)


def _mask_of(name: str, names: Iterable[str]) -> str:
    """Which mask of the model's arguments belongs to an activation: the decoder's own beside an encoder."""
    both = any("encoder" in other.split(".") for other in names)
    return _MASKS[both and "decoder" in name.split(".")]


def _token_weights(a: Tensor, mask: Any, *, normalise: bool = True) -> Tensor:
    """1 for each token that counts, 0 for others; of sum 1 if normalised: (...) of a (..., units)."""
    fits = isinstance(mask, Tensor) and mask.shape == a.shape[:-1]
    kept = mask.to(a.device, torch.float32) if fits else a.new_ones(a.shape[:-1], dtype=torch.float32)
    return kept / kept.sum().clamp(min=1) if normalise else kept
