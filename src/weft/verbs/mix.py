"""Mix: the weighted mean of what a model says with each of its adapters, one in use at a time.

    logits(x) = sum_j w_j logits_j(x) / sum_j w_j

The output-space counterpart of `weft.combine`, and a reference to judge merges by: nothing interferes, and a pass costs
as many as there are adapters. Where the model were linear in its weights, it would equal the weighted mean of the
deltas. From CMLoRA (2025, arXiv 2502.04923), which mixes the noise predictions of image models; its weights, one
dominant adapter among others, are `dominant`.
Deviations: its rotation of the dominant adapter over denoising steps and its cache of slow features have no counterpart
in a language model's forward pass and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from weft.errors import WeftError
from weft.terms.adapters import activate, adapters_of, find_adapter, unwrapped

__all__ = ["Mixture", "dominant", "mix"]


class Mixture(nn.Module):
    """The mixed model; `forward` takes what the model takes and gives logits. What was in use before is so after."""

    def __init__(self, model: nn.Module, weights: dict[str, float]) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean of the logits, each pass with one adapter; differentiable, without a key-value cache."""
        in_use = [name for name, adapter in adapters_of(self.model).items() if adapter.active]
        total = sum(self.weights.values())
        mean: Tensor | None = None
        try:
            for name, weight in self.weights.items():
                activate(self.model, [name])
                part = self.model(*args, **kwargs).logits * (weight / total)
                mean = part if mean is None else mean + part
        finally:
            activate(self.model, in_use)
        assert mean is not None
        return mean


def mix(model: nn.Module, names: Sequence[str], weights: Sequence[float] | None = None) -> Mixture:
    """A module whose forward pass gives the weighted mean of the logits under each of these adapters.

    Args:
        names: of adapters on the model.
        weights: one for each, such as `dominant(...)`; None for equal ones.

    Raises:
        WeftError: an unknown or repeated name, weights of another number, or weights that are not of positive sum.
    """
    model = unwrapped(model)
    for name in names:
        find_adapter(model, name)
    amounts = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(amounts) != len(names) or len(set(names)) != len(names):
        raise WeftError(f"There are {len(names)} names and {len(amounts)} weights; name each adapter once, with one.")
    if not sum(amounts) > 0:
        raise WeftError(f"The weights {amounts} have no positive sum, so they have no mean; give positive ones.")
    return Mixture(model, dict(zip(names, amounts, strict=True)))


def dominant(count: int, which: int = 0, strength: float | None = None) -> list[float]:
    """CMLoRA's weights of `count` adapters, which sum to `count`: n = N / (w0 + N - 1) each, w0 n the dominant one.

    Args:
        which: the position of the dominant adapter.
        strength: w0; None for the published N - 0.5, 1 for equal weights.
    """
    if not 0 <= which < count:
        raise WeftError(f"There is no adapter {which} among {count} to be the dominant one; give 0 to {count - 1}.")
    strength = count - 0.5 if strength is None else strength
    share = count / (strength + count - 1)
    return [strength * share if position == which else share for position in range(count)]
