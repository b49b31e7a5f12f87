"""Mix: the weighted mean of what a model says with each of its adapters, one in use at a time.

    logits(x) = sum_j w_j logits_j(x) / sum_j w_j

The output-space counterpart of `weft.combine`, and a reference to judge merges by: nothing interferes, and a pass costs
as many as there are adapters. Where the model were linear in its weights, it would equal the weighted mean of the
deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from weft.errors import WeftError
from weft.merging import MERGERS, Merger
from weft.terms.adapters import activate, adapters_of, find_adapter, unwrapped

__all__ = ["Mixture", "mix"]


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


def mix(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    method: str | Merger | None = None,
    **options: Any,
) -> Mixture:
    """A module whose forward pass gives the weighted mean of the logits under each of these adapters.

    Args:
        names: of adapters on the model.
        weights: one for each; None for equal ones, or those of `method`.
        method: of kind "mix", which gives the weights; with its own options.

    Raises:
        WeftError: an unknown or repeated name, both weights and a method, an option that it has not, weights of another
            number, or weights that are not of positive sum.

    Example:
        >>> model = weft.adapt(weft.adapt(model, "lora", name="one"), "lora", name="two")
        >>> logits = weft.mix(model, ["one", "two"], weights=[0.7, 0.3])(**batches[0])
    """
    model = unwrapped(model)
    for name in names:
        find_adapter(model, name)
    if method is not None and weights is None:
        chosen = MERGERS.find(method, "mix")
        assert chosen.weights is not None
        weights = chosen.weights(len(names), **chosen.options(options))
    elif method is not None or options:
        raise WeftError("Give either weights= or a method= of mixing with its options, not both.")
    amounts = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(amounts) != len(names) or len(set(names)) != len(names):
        raise WeftError(f"There are {len(names)} names and {len(amounts)} weights; name each adapter once, with one.")
    if not sum(amounts) > 0:
        raise WeftError(f"The weights {amounts} have no positive sum, so they have no mean; give positive ones.")
    return Mixture(model, dict(zip(names, amounts, strict=True)))
