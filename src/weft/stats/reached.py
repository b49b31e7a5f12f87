"""Which layers the calibration text reaches: all of them, but for a mixture's experts to which no token was routed.

One forward pass, with a backward pass where gradients are to be collected, that counts and keeps nothing else. What it
did not reach has no statistics, and is left as it is by every verb, with a warning that names it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weft.errors import WeftError
from weft.signals import stop_here
from weft.stats.calibrate import Batch, differentiable_inputs, frozen, run_batch
from weft.stats.collect import GRADIENT_NEEDS, Collector
from weft.terms.experts import expert_layers
from weft.terms.layers import shape_of

__all__ = ["reached"]


class _Counter(Collector):
    """Counts the tokens of each layer, and notes where a gradient came."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(layers, ())
        self.touched: set[str] = set()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            keep = self.streams.now.keep(args[0])
            self.tokens[name] += args[0][..., 0].numel() if keep is None else int(keep.sum())
            if output.requires_grad:
                output.register_hook(lambda grad: self.touched.update([name] if grad.any() else []))  # type: ignore[no-untyped-call]

        return hook


def reached(
    model: nn.Module,
    layers: Sequence[str],
    needs: Iterable[str],
    batches: Sequence[Batch],
    given: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[str]:
    """Those of the layers that are no experts', or that the batches reach; the others are named in a warning.

    Args:
        needs: the statistics that are to be collected; for none, every layer stays.
        given: statistics in place of the batches.

    Raises:
        WeftError: none is reached.
    """
    experts, needs = expert_layers(model, layers), set(needs)
    if not experts or not needs or not (batches or given is not None):
        return list(layers)
    if given is not None:
        seen = {name for name in experts if name in given}
    else:
        seen = _seen(model, sorted(experts), batches, backward=bool(needs & set(GRADIENT_NEEDS)))
    left = [name for name in layers if name in experts - seen]
    if len(left) == len(layers):
        raise WeftError(f"No calibration token reaches {_some(left)}; give more text, or name other layers.")
    if left:
        warnings.warn(f"No calibration token reaches {_some(left)}: they stay as they are.", stacklevel=3)
    return [name for name in layers if name not in left]


def _seen(model: nn.Module, experts: list[str], batches: Sequence[Batch], *, backward: bool) -> set[str]:
    counter = _Counter({name: model.get_submodule(name) for name in experts})
    with frozen(model), counter, counter.streams.following(model), differentiable_inputs(model, backward):
        for batch in batches:
            run_batch(model, batch, counter, backward)
            stop_here()
    seen = {name for name in experts if counter.tokens[name] and (not backward or name in counter.touched)}
    thin = [name for name in experts if name in seen and counter.tokens[name] < shape_of(counter.layers[name])[1]]
    if thin:
        warnings.warn(
            f"Fewer tokens than a layer has input channels reach {_some(thin)}: their statistics leave directions out; "
            "give more calibration text.",
            stacklevel=4,
        )
    return seen


def _some(names: Sequence[str]) -> str:
    first = ", ".join(names[:4])
    return f"{first} and {len(names) - 4} more layers of experts" if len(names) > 4 else first
