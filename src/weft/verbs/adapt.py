"""Adapters and grafts on a model: put on by a method, and trained.

weft.adapt(model, "pissa", rank=16, targets="all-linear", name="default")
optimizer = torch.optim.AdamW(weft.parameter_groups(model, lr=2e-4))
with weft.disable(model): ...                   # the base model
weft.set_adapter(model, ["default", "other"])   # their deltas add up
weft.remove_adapter(model)                      # the model of before, byte for byte
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.grafts import Graft
from weft.grafts import base as grafts
from weft.io.base import check_readable
from weft.io.quantizer import remark
from weft.methods import METHODS, Method, Site
from weft.methods.base import Moments
from weft.records import find
from weft.rules import Rule, make_rules
from weft.seeds import generator
from weft.stats.calibrate import Batch
from weft.stats.groups import Collected, WithWeights
from weft.stats.reached import reached
from weft.terms import Replacement, Term
from weft.terms.adapters import (
    Adapter,
    adapters_of,
    attach,
    base_terms,
    unwrapped,
)
from weft.terms.experts import within_experts
from weft.terms.extras import new_head
from weft.terms.layers import bias_of, shape_of
from weft.verbs.adapters import check_ungrafted, disable, merge_adapter, remove_adapter, set_adapter
from weft.verbs.targets import ranks_of

__all__ = [
    "Trainable",
    "adapt",
    "disable",
    "effective_rates",
    "make_optimizer",
    "merge_adapter",
    "parameter_groups",
    "remove_adapter",
    "rules",
    "set_adapter",
    "trainable",
]

Stats = Mapping[str, Moments]
RANK = 16
"""Of an adapter, where none is given."""


@dataclass(frozen=True)
class Trainable:
    """What training will update."""

    parameters: dict[str, nn.Parameter]  # by name
    count: int  # numbers in them that are trained: without the room that a growing adapter has
    total: int  # numbers in the whole model

    @property
    def share(self) -> float:
        """count / total."""
        return self.count / max(self.total, 1)


@within_experts
def adapt(
    model: nn.Module,
    method: str | Method | Graft,
    rank: int | None = None,
    targets: str | Sequence[str] = "all-linear",
    name: str = "default",
    *,
    stats: Stats | None = None,
    batches: Iterable[Batch] | None = None,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """Put an adapter on the model's linear layers, or a graft on its forward pass, and freeze everything else; the same
    model is returned.

    The head of a classifier, which no base model brings, is trained along and saved with the adapter.

    Args:
        method: a method of kind "adapt" or "graft", by its name (see `weft.methods()`) or its record. A graft takes
            `batches`, `seed`, `dtype` and its own options alone.
        rank: of every layer's adapter (what it counts is the method's affair: components, block side, basis size);
            16 by default. With "all-linear", layers too small for it get the largest that they can have.
        targets: "all-linear", or names and shell patterns: "q_proj" matches every layer of that name, "*.0.*" the first
            block, and "!q_proj" leaves out what it matches.
        name: an identifier; several adapters with different names add up.
        stats: statistics by layer, as `weft.calibrate` gives them, for methods that need some.
        batches: data to calibrate on instead, e.g. [{"input_ids", "attention_mask", "labels"}, ...]. Statistics that
            would take more memory than the model are collected for some blocks after others, with a pass
            over the batches for each group.
        seed: of every random number; a layer's draw depends on the seed and its name alone.
        ranks: layer -> rank, e.g. an allocation; overrides `rank` (which then only sets the scale), and layers that it
            lacks or gives 0 get no adapter.
        dtype: of the trainable tensors: fp32 whatever the model's dtype, for small updates vanish in half precision.
            The product is computed in the layer's dtype.
        **options: the method's own, see its defaults.

    Raises:
        WeftError: an unknown method or option, a rank that is no rank of a layer, targets or ranks that match nothing,
            a name in use, missing statistics, or an adapter that cannot stand beside those already there. The model is
            then as it was.

    >>> model = weft.adapt(model, "pissa", rank=4, targets=["q_proj", "v_proj"])
    """
    model = unwrapped(model)
    chosen = find(method, "adapt", "graft")
    if isinstance(chosen, Graft):
        _check_whole(chosen, rank=rank, targets=targets, name=name, stats=stats, ranks=ranks)
        return grafts.put(model, chosen, batches=batches, seed=seed, dtype=dtype, **options)
    assert isinstance(chosen, Method)
    check_ungrafted(model)
    options, rank = chosen.options(options), RANK if rank is None else rank
    layers = ranks_of(model, chosen, rank, targets, ranks, options)
    if name in adapters_of(model):
        raise WeftError(
            f"There is an adapter {name!r} on this model already; remove it first (weft.remove_adapter) or choose "
            "another name=."
        )
    check_readable(model, layers)
    batches = None if batches is None else list(batches)
    layers = {layer: layers[layer] for layer in reached(model, list(layers), chosen.needs, batches or [], stats)}
    moments = _moments(model, chosen, layers, stats, batches)
    if chosen.spread is not None and ranks is None:
        shapes = {layer: shape_of(model.get_submodule(layer)) for layer in layers}
        known = WithWeights(model, moments)
        layers = {layer: r for layer, r in chosen.spread(known, shapes, rank, options).items() if r}
        if not layers:
            raise WeftError(
                f"The method {chosen.name!r} leaves every layer without an adapter; check its options and targets=."
            )
    adapter = Adapter(name, chosen.name, {}, settings={"rank": rank, "ranks": layers, "seed": seed, "options": options})
    adapter.terms = _terms(model, chosen, name, rank, layers, moments, seed, dtype, options)
    adapter.rates = {key: rate for key, rate in (chosen.rates(options) if chosen.rates else {}).items() if rate != 1}
    adapter.extras = {key: model.get_parameter(key).detach().clone() for key in _along(model, chosen, layers, options)}
    attach(model, adapter)
    remark(model)
    return model


def _along(model: nn.Module, method: Method, layers: Iterable[str], options: Mapping[str, Any]) -> list[str]:
    """The parameters of the model itself that are trained along: the method's own choice, and a new head, which nothing
    has trained yet, unless another adapter in use trains it.
    """
    taken = {key for adapter in adapters_of(model).values() if adapter.active for key in adapter.extras}
    names = [key for key, _ in model.named_parameters()]
    chosen = method.extras(list(layers), names, options) if method.extras is not None else []
    return list(dict.fromkeys([*chosen, *(key for key in new_head(model) if key not in taken)]))


def trainable(model: nn.Module) -> Trainable:
    """The parameters that require a gradient, by name, how many numbers they are, and how many the model has.

    >>> weft.trainable(weft.adapt(model, "lora-xs", rank=4)).count  # 14 matrices, 4 x 4 numbers each
    224
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    count = sum(p.numel() for p in named.values()) - sum(map(_room, _active(model)))
    return Trainable(named, count, sum(p.numel() for p in model.parameters()))


def _room(adapter: Adapter) -> int:
    """Numbers of an adapter's trainable tensors that are there for what may grow, beyond those that are trained."""
    method = METHODS[adapter.method]
    if method.held is None or method.count is None:
        return 0
    options, total = method.defaults | adapter.settings["options"], 0
    for layer, rank in adapter.settings["ranks"].items():
        term = next(iter(adapter.terms[layer].values()))
        shape = term.out_features, term.in_features
        total += method.held(*shape, rank, options) - method.count(*shape, rank, options)
    return total


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, one for each pair of rate and decay.

    A method's own rate factors apply (LoRA+: B learns `ratio` times faster); vectors and biases are not decayed.

    >>> groups = weft.parameter_groups(weft.adapt(model, "lora", ratio=16.0), lr=1e-4)
    >>> optimizer = torch.optim.AdamW(groups)
    """
    rates = {
        id(parameter): adapter.rates.get(key.rpartition(".")[2], 1.0)
        for adapter in adapters_of(model).values()
        for key, parameter in adapter.named_parameters()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trainable(model).parameters.values():
        key = (lr * rates.get(id(parameter), 1.0), weight_decay if parameter.dim() > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """The optimizer that the active adapters' methods ask for, over `parameter_groups`; AdamW (fused on a GPU) where
    none does.

    Raises WeftError when two adapters ask for different ones.
    """
    groups = parameter_groups(model, lr, weight_decay)
    asked = {
        adapter.method: adapter.settings.get("options", {})
        for adapter in _active(model)
        if METHODS[adapter.method].optimizer is not None
    }
    if len(asked) > 1:
        raise WeftError(
            f"The methods {' and '.join(asked)} each need an optimizer of their own, so they cannot be trained "
            "together; set one of them aside with weft.set_adapter."
        )
    for method, options in asked.items():
        make = METHODS[method].optimizer
        assert make is not None
        return make(groups, options)
    return torch.optim.AdamW(groups, lr=lr, fused=groups[0]["params"][0].is_cuda or None)


def effective_rates(model: nn.Module, lr: float) -> dict[str, float]:
    """Adapter -> scale x lr, the rate that decides how fast its delta moves; the mean over layers where they differ.

    >>> weft.effective_rates(weft.adapt(model, "lora", rank=4, alpha=8.0), lr=1e-4)
    {'default': 0.0002}
    """
    scales = {
        name: [
            m.rate_scale
            for term in adapter.all_terms()
            for m in term.modules()
            if isinstance(m, Term) and m.rate_scale is not None and any(p.requires_grad for p in m.parameters())
        ]
        for name, adapter in adapters_of(model).items()
    }
    return {name: lr * (sum(found) / len(found) if found else 1.0) for name, found in scales.items()}


def rules(model: nn.Module) -> list[Rule]:
    """The rules of the active adapters' methods (see `weft.rules`), each with its adapter's terms as its scope, to be
    run around each training step.
    """
    return [
        rule
        for adapter in _active(model)
        for rule in make_rules(
            METHODS[adapter.method].rules, adapter.settings | adapter.settings.get("options", {}), adapter.terms
        )
    ]


def _active(model: nn.Module) -> list[Adapter]:
    """The adapters in use whose methods are known."""
    return [adapter for adapter in adapters_of(model).values() if adapter.active and METHODS.known(adapter.method)]


def _check_whole(graft: Graft, **given: Any) -> None:
    """Raises WeftError where a graft is given what only adapters of layers have."""
    unused = {"rank": None, "targets": "all-linear", "name": "default", "stats": None, "ranks": None}
    strange = next((name for name, value in given.items() if value != unused[name]), None)
    if strange is not None:
        raise WeftError(
            f"{graft.name!r} changes the forward pass as a whole: it takes no {strange}=; its own options are: "
            f"{', '.join(graft.defaults) or 'none'}."
        )


def _moments(
    model: nn.Module, method: Method, layers: Iterable[str], stats: Stats | None, batches: Sequence[Batch] | None
) -> Stats:
    layers = list(layers)
    if not method.needs:
        return {layer: {} for layer in layers}
    if stats is None:
        if batches is None:
            raise WeftError(
                f"The method {method.name!r} starts from data ({', '.join(method.needs)}); give "
                f"batches=[{{'input_ids': ...}}, ...], or "
                "stats= from weft.calibrate."
            )
        return Collected(model, batches, method.needs, layers)
    for layer in layers:
        missing = [need for need in method.needs if need not in stats.get(layer, {})]
        if missing:
            raise WeftError(
                f"The statistics lack {missing[0]!r} of the layer {layer}, which {method.name!r} starts from; "
                "calibrate with "
                f"needs={list(method.needs)}."
            )
    return stats


def _terms(
    model: nn.Module,
    method: Method,
    name: str,
    rank: int,
    layers: Mapping[str, int],
    moments: Stats,
    seed: int,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Term]]:
    """layer -> term name -> term, as the method makes them; nothing in the model is touched."""
    assert method.split is not None
    shared = None
    if method.share is not None:
        shapes = {layer: shape_of(model.get_submodule(layer)) for layer in layers}
        shared = method.share(shapes, rank, generator(seed, method.name), options)
    made: dict[str, dict[str, Term]] = {}
    for layer, r in layers.items():
        base = base_terms(model, layer)
        bias = bias_of(model.get_submodule(layer))
        site = Site(layer, base, r, rank, moments[layer], generator(seed, method.name, layer), dtype, shared, bias)
        roles = dict(method.split(site, **options).terms)
        if method.replaces:
            code, update = roles.pop("base"), roles.pop("")
            roles[""] = Replacement(code.in_features, code.out_features, code, update)
        made[layer] = {f"{name}_{role}" if role else name: term for role, term in roles.items()}
    return made
