"""put: the one way to set a sum of terms in the place of a model's layer, and to take a sum of one matrix away."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Literal

from torch import Tensor, nn

from weft.errors import WeftError
from weft.terms.adapters import adapters_of, plain_layer, unwrapped
from weft.terms.base import Term
from weft.terms.dense import Dense
from weft.terms.experts import open_experts
from weft.terms.layers import is_conv1d, is_linear, replace, shape_of
from weft.terms.sum_linear import SumLinear

__all__ = ["KEEP", "Keep", "is_one_matrix", "put", "unput"]


class Keep(Enum):
    """The type of `KEEP`."""

    KEEP = "keep"


KEEP: Literal[Keep.KEEP] = Keep.KEEP
"""For `put`: the layer's own bias stays, the very parameter."""


def put(
    model: nn.Module, layer: str, terms: Mapping[str, Term], bias: Tensor | Literal[Keep.KEEP] | None = KEEP
) -> SumLinear:
    """Set the sum of `terms` in the place of a linear layer, and return it.

    What the layer was to others stays: its train or eval mode, its hooks (handles to them still remove them), its
    device, to which the terms are moved; a Conv1D stays one when it is merged. The terms keep their dtype, and what
    requires a gradient among their parameters stays so.

    Args:
        model: a module, changed in place; a compiled or distributed one is looked into.
        layer: the name of an `nn.Linear`, a `Conv1D` or a `SumLinear` in it.
        terms: name -> term, all of the layer's shape, in the order of summation.
        bias: (out,), in the dtype and on the device of the layer from then on, trained as the layer was; None for no
            bias; KEEP for the very parameter that is there.

    Raises:
        WeftError: there is no linear layer of that name, the terms have another shape, or the layer has adapters on.
    """
    model = unwrapped(model)
    open_experts(model, lambda name: name == layer)
    old = dict(model.named_modules()).get(layer)
    if old is None or not is_linear(old):
        raise WeftError(f"There is no linear layer {layer!r} in this {type(model).__name__}, so no terms can go there.")
    on = [adapter.name for adapter in adapters_of(model).values() if layer in adapter.terms]
    if on:
        raise WeftError(f"The layer {layer} has adapters on ({', '.join(on)}); merge or remove them first.")
    if not terms or any((term.out_features, term.in_features) != shape_of(old) for term in terms.values()):
        found = ", ".join(f"{key} {term.out_features} x {term.in_features}" for key, term in terms.items()) or "none"
        raise WeftError(f"The layer {layer} is {' x '.join(map(str, shape_of(old)))}, the terms for it are: {found}.")
    transposed = old.transposed if isinstance(old, SumLinear) else is_conv1d(old)
    new = SumLinear(terms, transposed=transposed)
    weight = old.weight
    assert isinstance(weight, Tensor)
    if not weight.is_meta and any(t.device != weight.device for t in [*new.parameters(), *new.buffers()]):
        new.to(weight.device)
    new.bias = _bias(old, bias)
    replace(model, layer, new)
    return new


def is_one_matrix(layer: nn.Module) -> bool:
    """Whether this is a sum of one Dense term."""
    return isinstance(layer, SumLinear) and [type(term) for term in layer.terms.values()] == [Dense]


def unput(model: nn.Module, layer: str) -> None:
    """Set the plain layer of the very same parameters in the place of a sum of one matrix (`is_one_matrix`)."""
    old = unwrapped(model).get_submodule(layer)
    assert isinstance(old, SumLinear)
    (term,) = old.terms.values()
    assert isinstance(term, Dense)
    replace(unwrapped(model), layer, plain_layer(term.matrix, old.bias, transposed=old.transposed))


def _bias(old: nn.Module, bias: Tensor | Literal[Keep.KEEP] | None) -> nn.Parameter | None:
    if bias is Keep.KEEP:
        return old.bias  # type: ignore[return-value]
    if bias is None:
        return None
    trained = old.bias if isinstance(old.bias, nn.Parameter) else next(old.parameters(), None)
    made = bias.detach().to(old.weight)  # type: ignore[arg-type]
    return nn.Parameter(made, requires_grad=trained is not None and trained.requires_grad)
