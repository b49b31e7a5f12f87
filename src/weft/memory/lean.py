"""Switching the memory saver on and off: which modules of a model it knows, and which it leaves as they are.

Modules are recognised by what they are (a leaf that is called a norm, an activation of the known names) or by what
they compute: a gated MLP is one whose children have the usual names and whose forward, run on small stand-ins for its
linear layers, gives the formula's values.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weft.memory import forwards
from weft.memory.forwards import LeanForward
from weft.terms import SumLinear
from weft.terms.layers import is_conv1d

__all__ = ["LeanReport", "is_gated_mlp", "language_model", "lean", "lean_report", "unlean", "without_logits"]

M = TypeVar("M", bound=nn.Module)

_NORM = re.compile(r"(RMS|Layer)Norm$")
# ReLU keeps its output alone, which whatever follows keeps as well: nothing to gain
_ACTIVATIONS = re.compile(r"^(SiLU\w*|\w*GELU\w*|Mish\w*|Laplace\w*|ReLUSquared\w*|XIELU\w*|Tanh|Softplus)$")
_GATED: dict[tuple[str, ...], Callable[..., Any]] = {
    ("gate_proj", "up_proj", "down_proj", "act_fn"): forwards.gated_mlp,
    ("gate_up_proj", "down_proj", "activation_fn"): forwards.fused_gated_mlp,
}


@dataclass(frozen=True)
class LeanReport:
    """What the saver does on a model: `lean` counts modules by kind, `left` names those it leaves, with the reason."""

    lean: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.lean.items()) or "nothing"
        return "\n".join(
            [
                f"lean: {kinds}",
                *(f"left as it is: {name or 'the model'}: {reason}" for name, reason in self.left.items()),
            ]
        )


def lean(model: M, on: bool = True) -> M:
    """Keep fewer activations in training: the same model, the same gradients to rounding.

    The input of a layer is kept once for its base and its adapters, norms and the element-wise parts of the MLP are
    recomputed in backward, and the loss is computed without the logits (`output.logits` is None in training when
    labels are given). What is unknown stays as it is and is named by `weft.memory.lean_report`. Call it after
    `weft.adapt`; calling it again is free, and takes in what has come since.

    Args:
        model: any model, transformers' ones above all; changed in place.
        on: False switches the saver off again.

    Example:
        >>> model = weft.lean(weft.adapt(model, "lora", rank=4))
    """
    if not on:
        return unlean(model)
    for _, module, run in _plan(model):
        if run is not None and not isinstance(run, str) and "forward" not in module.__dict__:
            # an instance attribute goes before the class's forward
            module.forward = LeanForward(module, run)
    return model


def unlean(model: M) -> M:
    """Switch the memory saver off: every module is as its class made it."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), LeanForward):
            del module.forward
    return model


def lean_report(model: nn.Module) -> LeanReport:
    """What the saver does on this model as it is now, and what it leaves."""
    counts: dict[str, int] = {}
    left: dict[str, str] = {}
    for name, module, run in _plan(model):
        forward = module.__dict__.get("forward")
        if isinstance(forward, LeanForward):
            kind = forward.run.__name__
            counts[kind] = counts.get(kind, 0) + 1
        elif forward is not None and callable(run):
            left[name] = "something else has replaced its forward"
        elif isinstance(run, str):
            left[name] = run
        elif run is not None:
            left[name] = "the saver is off; weft.lean(model) switches it on"
    return LeanReport(counts, left)


@contextmanager
def without_logits(model: nn.Module) -> Iterator[None]:
    """Within the block a language model that is given labels makes its loss without the logits, in any mode: they are
    None in its output. One whose forward something else has replaced, or whose head is watched by hooks, goes on as it
    does.
    """
    whole = language_model(model)
    if whole is None or "forward" in whole.__dict__:
        yield
        return
    whole.forward = partial(forwards.loss_alone, whole)
    try:
        yield
    finally:
        del whole.forward


def _plan(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[..., Any] | str | None]]:
    """Every module with its lean forward, the reason why it has none, or None where there is nothing to save."""
    whole = language_model(model)
    if whole is None:
        yield "", model, "it has no output head, so its loss stays as it is"
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    for name, module in model.named_modules():
        run = forwards.causal_lm if module is whole else _known(module)
        if run is None and attention == "eager" and re.search(r"Attention\w*$", type(module).__name__):
            run = "eager attention keeps its tokens x tokens matrix; load the model with attn_implementation='sdpa'"
        if run is not None:
            yield name, module, run


def _known(module: nn.Module) -> Callable[..., Any] | str | None:
    children = dict(module.named_children())
    kind = type(module).__name__
    if isinstance(module, SumLinear):
        return forwards.sum_linear if _fits(module) else f"no lean form of its terms: {', '.join(module.terms)}"
    if not children and (_NORM.search(kind) or _ACTIVATIONS.match(kind)):
        return forwards.elementwise
    if type(module) is nn.Linear or is_conv1d(module):
        return forwards.plain_linear if module.weight.requires_grad else None  # type: ignore[union-attr]
    if any(p.dim() == 3 for p in module._parameters.values() if p is not None):
        return "holds a stack of experts as one tensor"
    for names, run in _GATED.items():
        if set(names) == children.keys():
            return run if _computes(module, run) else f"its forward is not the usual one of {', '.join(names)}"
    gates = [child for child in children if "gate" in child]
    return "a gated MLP of unknown form" if gates and any("down" in child for child in children) else None


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module is a gated MLP of a known form: it works on every row alone."""
    children = dict(module.named_children()).keys()
    return any(set(names) == children and _computes(module, run) for names, run in _GATED.items())


def _fits(module: SumLinear) -> bool:
    first, *rest = module._terms()
    known = first.lean_weight() is not None or bool(first.lean_parts())
    return known and all(term.lean_parts() is not None or term.lean_alone for term in rest)


def _computes(module: nn.Module, run: Callable[..., Any]) -> bool:
    """Whether the class's forward gives the values of `run`, with small linear layers in place of the module's own."""
    probe = copy.copy(module)
    sizes = {"gate_proj": (4, 3), "up_proj": (4, 3), "gate_up_proj": (8, 3), "down_proj": (3, 4)}
    probe.__dict__["_modules"] = {
        name: _stand_in(*sizes[name]) if name in sizes else child for name, child in module.named_children()
    }
    x = _wave(2, 3)
    try:
        with torch.no_grad():
            return torch.equal(type(module).forward(probe, x), run(probe, x))
    except (TypeError, AttributeError, RuntimeError):
        return False


def _stand_in(rows: int, columns: int) -> nn.Module:
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(_wave(rows, columns), requires_grad=False)
    return layer


def _wave(rows: int, columns: int) -> Tensor:
    """Numbers without a pattern and without a random generator."""
    return torch.arange(1, rows * columns + 1, dtype=torch.float32).mul(2.7).sin().view(rows, columns)


def language_model(model: nn.Module) -> nn.Module | None:
    """The outermost module that takes labels and has an output head."""
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", None)
        takes_labels = "labels" in inspect.signature(type(module).forward).parameters
        if head is not None and takes_labels and isinstance(head(), nn.Module):
            return module
    return None
