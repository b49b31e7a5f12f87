"""The adapters on a model: named terms beside the base of each layer, put on, switched, and taken off without a trace.

An adapted layer is `SumLinear({"base": Dense, "<adapter>": Term, ...})`; the base shares the memory of the plain
layer's weight. Only adapters in use are in the sum, so whatever reads a `SumLinear` (merging, saving, counting) sees
what the model computes; those put aside are kept in the model's book, outside its state_dict. When the last adapter
leaves, the plain layer is back with the very same parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError, nearest
from weft.terms.base import Term
from weft.terms.dense import Dense, sum_dense
from weft.terms.experts import fuse
from weft.terms.extras import Frame, exchange, frame_of
from weft.terms.hooks import check_at_hand
from weft.terms.layers import is_conv1d, replace
from weft.terms.sum_linear import SumLinear
from weft.terms.wrapper import Wrapper

__all__ = [
    "Adapter",
    "activate",
    "adapters_of",
    "attach",
    "base_terms",
    "detach",
    "disable",
    "find_adapter",
    "forget",
    "plain_layer",
    "unwrapped",
]

_BOOK = "_weft_adapters"


@dataclass
class Adapter:
    """One adapter: its terms by layer, and what made them.

    Args:
        name: an identifier.
        method: the name of its method.
        terms: layer name -> term name -> term; the first term is named like the adapter, further ones `<name>_<role>`.
        settings: what the method was called with, JSON-able.
        rates: factor of the learning rate by parameter name within a term, e.g. {"B": 16.0}; 1 where absent.
        extras: parameters of the model itself that are trained along (biases, a head): name -> the values put aside,
            which are the base's while the adapter is active and the adapter's while it is not.
        apart: those extras that the base ties to another parameter, and the adapter does not.
        rows: those extras of which the adapter brings some rows only, which ones; they are not trained further.
        active: whether its terms are in the sums.
    """

    name: str
    method: str
    terms: dict[str, dict[str, Term]]
    settings: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    active: bool = True

    def all_terms(self) -> list[Term]:
        """Its terms in the order of the layers."""
        return [term for terms in self.terms.values() for term in terms.values()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its trainable parameters, each once, as `<layer>.terms.<term>.<parameter>`; no wrapped base is among them."""
        seen: set[int] = set()
        for layer, terms in self.terms.items():
            for key, term in terms.items():
                for name, parameter in term.own_parameters():
                    if parameter.requires_grad and id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield f"{layer}.terms.{key}.{name}", parameter


@dataclass
class _Book:
    """What must be remembered to take everything off again."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    base: dict[str, dict[str, Term]] = field(default_factory=dict)  # layer -> the terms that are no adapter's
    plain: set[str] = field(default_factory=set)  # layers that were no sums before
    classes: dict[str, type[nn.Module]] = field(default_factory=dict)  # what those were, where no nn.Linear or Conv1D
    trained: list[str] = field(default_factory=list)  # names of the parameters that were trainable before
    frame: Frame = field(default_factory=Frame)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and `DistributedDataParallel`."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on the model by name, in the order they were put on, those put aside included."""
    return dict(_book(unwrapped(model)).adapters)


def find_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """The adapter of that name, or the only one for None. Raises WeftError with the names there are."""
    there = adapters_of(model)
    if not there:
        raise WeftError("There is no adapter on this model; put one on with weft.adapt or weft.load_adapter.")
    if name is None and len(there) > 1:
        raise WeftError(f"There are several adapters on this model ({', '.join(there)}); say which one by name.")
    if name is not None and name not in there:
        raise WeftError(
            f"There is no adapter {name!r} on this model; there is: {', '.join(nearest(name, there, len(there)))}."
        )
    return there[name] if name is not None else next(iter(there.values()))


def base_terms(model: nn.Module, layer: str) -> dict[str, Term]:
    """The terms of a linear layer that are no adapter's; a plain layer counts as one Dense term, which shares its
    memory.
    """
    book = _book(unwrapped(model))
    if layer in book.base:
        return dict(book.base[layer])
    module = unwrapped(model).get_submodule(layer)
    return dict(module._named_terms()) if isinstance(module, SumLinear) else {"base": _dense_of(module)}


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter on: its layers become sums, everything else in the model is frozen.

    Raises:
        WeftError: the name is taken or no identifier, a term has another shape than its layer, or the adapter
            changes the base of a layer itself where another one does.
    """
    model = unwrapped(model)
    book = _book(model)
    _check(model, book, adapter)
    if not book.adapters:
        book.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        book.frame = frame_of(model)
        model.requires_grad_(False)
    setattr(model, _BOOK, book)
    book.adapters[adapter.name] = adapter
    for layer in adapter.terms:
        if layer not in book.base:
            _open(model, book, layer)
        _arrange(model, book, layer)
    for key in adapter.extras:
        model.get_parameter(key).requires_grad_(adapter.active and key not in adapter.rows)


def detach(model: nn.Module, name: str | None = None) -> Adapter:
    """Take an adapter off and return it; layers without any other become what they were, in value and in memory."""
    model = unwrapped(model)
    adapter, book = find_adapter(model, name), _book(model)
    if adapter.active:
        _swap_extras(model, adapter, active=False)
    book.frame.agree(model)
    del book.adapters[adapter.name]
    for layer, terms in adapter.terms.items():
        _unwrap(terms)
        _arrange(model, book, layer)
        if not any(layer in other.terms for other in book.adapters.values()):
            _close(model, book, layer)
    if not book.adapters:
        was_trained = set(book.trained)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in was_trained)
        delattr(model, _BOOK)
    fuse(model)
    return adapter


def activate(model: nn.Module, names: Iterable[str]) -> None:
    """Use exactly these adapters (none: the base alone); their deltas add up.

    Raises WeftError for an unknown name, or two that cannot stand together.
    """
    model = unwrapped(model)
    book, names = _book(model), list(names)
    chosen = [find_adapter(model, name) for name in names]
    for index, adapter in enumerate(chosen):
        _check_together(chosen[:index], adapter)
    for wanted in (False, True):  # put aside before taking up: two adapters may train the same bias
        for adapter in book.adapters.values():
            if (adapter.name in names) is wanted and adapter.active is not wanted:
                adapter.active = wanted
                _swap_extras(model, adapter, active=wanted)
    book.frame.agree(model)
    for layer in book.base:
        _arrange(model, book, layer)


def forget(model: nn.Module) -> None:
    """Leave the layers as they are, the adapters in use a part of them for good; those put aside are gone."""
    unwrapped(model).__dict__.pop(_BOOK, None)


def merge(model: nn.Module, name: str | None = None) -> dict[str, float]:
    """Fold an adapter into the base for good: W + T is added in fp32 and cast last. Layers without any other adapter
    become plain.

    A base of other terms than one dense matrix (compressed, quantised) is expanded to a dense one, that of its own
    function.

    Returns:
        layer -> how much of the update is lost in the cast to the layer's dtype, ||cast(W + T) - (W + T)||_F / ||T||_F.
    """
    model = unwrapped(model)
    adapter, book = find_adapter(model, name), _book(model)
    for term in [*adapter.all_terms(), *(term for layer in adapter.terms for term in book.base[layer].values())]:
        if not term.linear:
            term.dense()  # raises, before anything is changed
    others = [other.name for other in book.adapters.values() if other.active and other is not adapter]
    activate(model, [adapter.name])
    lost = {}
    for layer in adapter.terms:
        module = model.get_submodule(layer)
        assert isinstance(module, SumLinear)
        whole = module.dense(torch.float32).detach()
        before = sum_dense(book.base[layer].values())
        merged = whole.to(module.weight.dtype)
        lost[layer] = float((merged.float() - whole).norm() / (whole - before).norm().clamp(min=torch.finfo().tiny))
        _unwrap(adapter.terms[layer])
        book.base[layer] = {"base": Dense.from_matrix(merged).requires_grad_(False)}
        book.plain.add(layer)
    adapter.extras.clear()  # the model keeps the trained values
    book.frame = frame_of(model)
    detach(model, adapter.name)
    if others:
        activate(model, others)
    return lost


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """The base model alone, within the block: every adapter is put aside and put back."""
    names = [adapter.name for adapter in adapters_of(model).values() if adapter.active]
    activate(model, [])
    try:
        yield
    finally:
        activate(model, names)


def _book(model: nn.Module) -> _Book:
    found = model.__dict__.get(_BOOK)
    return found if found is not None else _Book()


def _dense_of(module: nn.Module) -> Dense:
    """The plain layer's weight as a term: the same parameter for an nn.Linear, a transposed copy for a Conv1D."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    if is_conv1d(module):
        return Dense.from_matrix(weight.transpose(0, 1))
    term = Dense(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    term.matrix = weight
    return term


def _open(model: nn.Module, book: _Book, layer: str) -> None:
    """Make a layer a sum whose terms are remembered as its base."""
    module = model.get_submodule(layer)
    if not isinstance(module, SumLinear):
        book.plain.add(layer)
        if type(module) is not nn.Linear and not is_conv1d(module):
            book.classes[layer] = type(module)
        made = SumLinear({"base": _dense_of(module)}, transposed=is_conv1d(module))
        made.bias = module.bias  # type: ignore[assignment]
        made.requires_grad_(False)
        replace(model, layer, made)
        module = made
    book.base[layer] = dict(module.terms.items())  # type: ignore[arg-type]


def _close(model: nn.Module, book: _Book, layer: str) -> None:
    """Give the layer back as it was before `_open`."""
    module = model.get_submodule(layer)
    assert isinstance(module, SumLinear)
    terms = book.base.pop(layer)
    if layer not in book.plain:
        return
    book.plain.discard(layer)
    (base,) = terms.values()
    assert isinstance(base, Dense)
    plain = plain_layer(base.matrix, module.bias, transposed=module.transposed)
    plain.__class__ = book.classes.pop(layer, type(plain))
    replace(model, layer, plain)


def plain_layer(matrix: nn.Parameter, bias: nn.Parameter | None, *, transposed: bool) -> nn.Module:
    """The nn.Linear or Conv1D of these very parameters (a Conv1D's weight is transposed, hence copied)."""
    out_features, in_features = matrix.shape
    if transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            plain: nn.Module = Conv1D(out_features, in_features)  # type: ignore[no-untyped-call]
        plain.weight = nn.Parameter(matrix.detach().transpose(0, 1).contiguous(), requires_grad=matrix.requires_grad)
    else:
        plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        plain.weight = matrix
    if bias is not None:
        plain.bias = bias
    return plain


def _arrange(model: nn.Module, book: _Book, layer: str) -> None:
    """Set the layer's terms: the base, or the one adapter that transforms it, then what the active adapters add."""
    module = model.get_submodule(layer)
    assert isinstance(module, SumLinear)
    here = [adapter for adapter in book.adapters.values() if layer in adapter.terms]
    for adapter in here:
        _unwrap(adapter.terms[layer])
    first: Mapping[str, Term] = book.base[layer]
    added: dict[str, Term] = {}
    module.aside = [term for adapter in here if not adapter.active for term in adapter.terms[layer].values()]
    for adapter in here:
        for key, term in adapter.terms[layer].items() if adapter.active else ():
            if isinstance(term, Wrapper):
                term.wrap(first)
                first = {key: term}
            else:
                added[key] = term
    module.terms = nn.ModuleDict({**first, **added}).train(module.training)


def _swap_extras(model: nn.Module, adapter: Adapter, *, active: bool) -> None:
    for key, aside in adapter.extras.items():
        adapter.extras[key] = exchange(model, key, aside, apart=key in adapter.apart)
        model.get_parameter(key).requires_grad_(active and key not in adapter.rows)


def _unwrap(terms: Mapping[str, Term]) -> None:
    for term in terms.values():
        if isinstance(term, Wrapper):
            term.unwrap()


def _check(model: nn.Module, book: _Book, adapter: Adapter) -> None:
    name = adapter.name
    if not name.isidentifier():
        raise WeftError(f"An adapter's name is letters, digits and underscores, without dots; {name!r} is not.")
    if name in book.adapters:
        raise WeftError(
            f"There is an adapter {name!r} on this model already; remove it first (weft.remove_adapter) or choose "
            "another name=."
        )
    check_at_hand(model, adapter.terms)
    for layer, terms in adapter.terms.items():
        shapes = {key: (term.out_features, term.in_features) for key, term in base_terms(model, layer).items()}
        taken = shapes.keys() | {key for other in book.adapters.values() for key in other.terms.get(layer, ())}
        clash = sorted(taken & terms.keys())
        if clash:
            raise WeftError(
                f"The layer {layer} has a term called {clash[0]!r} already; choose another name= than {name!r}."
            )
        shape = next(iter(shapes.values()))
        for key, term in terms.items():
            if (term.out_features, term.in_features) != shape:
                raise WeftError(
                    f"The adapter's term {key} is {term.out_features} x {term.in_features}, and the layer {layer} is "
                    f"{shape[0]} x {shape[1]}; the adapter belongs to another model."
                )
    _check_together([other for other in book.adapters.values() if other.active], adapter)


def _check_together(others: Iterable[Adapter], adapter: Adapter) -> None:
    mine = _wrapped_layers(adapter)
    for other in others:
        shared = sorted(adapter.extras.keys() & other.extras.keys())
        if shared:
            raise WeftError(
                f"The adapters {other.name!r} and {adapter.name!r} both train {shared[0]} itself; use one at a time "
                "(weft.set_adapter)."
            )
        both = sorted(mine & _wrapped_layers(other))
        if both:
            raise WeftError(
                f"The adapters {other.name!r} ({other.method}) and {adapter.name!r} ({adapter.method}) both change "
                f"the base itself in {both[0]}, "
                "so their changes do not add up; use one at a time (weft.set_adapter)."
            )


def _wrapped_layers(adapter: Adapter) -> set[str]:
    return {layer for layer, terms in adapter.terms.items() if any(term.alone for term in terms.values())}
