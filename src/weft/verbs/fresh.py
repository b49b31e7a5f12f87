"""Structured weights: a method of kind "pretrain" makes the layers that are trained, of a fresh model or a given one,
and in the end what they become.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.errors import WeftError
from weft.grafts import GRAFTS, Graft
from weft.grafts.base import put as put_graft
from weft.io.quantizer import unmark
from weft.methods import METHODS, Method, Site
from weft.records import Record
from weft.rules import Rule, make_rules
from weft.seeds import generator
from weft.terms import SumLinear
from weft.terms.adapters import base_terms
from weft.terms.layers import bias_of, linear_layers, shape_of
from weft.terms.put import KEEP, is_one_matrix, put, unput

__all__ = ["Grafting", "Structure", "ends_of", "finish", "restructure"]

QUARTER = 4
"""The published ranks of low-rank pre-training are about a quarter of the model's width."""


@dataclass(frozen=True)
class Structure:
    """What stands in the place of a model's matrices.

    Args:
        method: of kind "pretrain", or of kind "train" that has a `split`.
        rank: of every layer; None for a quarter of the smallest side among them, and for methods without a rank.
        options: all of the method's own.
    """

    method: Method
    rank: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    grafts: ClassVar[bool] = False
    """Whether it changes the forward pass, and no matrix."""

    @classmethod
    def of(
        cls,
        method: str | Method,
        rank: float | None = None,
        options: Mapping[str, Any] | None = None,
        given: bool = False,
    ) -> Structure:
        """By name, checked as far as can be without a model; `given`: for a trained model rather than a fresh one.

        Raises WeftError for an unknown method or option, and a rank that is none or that the method does not take.
        """
        graft = GRAFTS.get(method) if isinstance(method, str) else method
        if isinstance(graft, Graft):
            return Grafting.of_graft(graft, rank, options or {}, given)
        found = METHODS.find(method, "pretrain")
        if rank is not None and not found.ranked:
            raise WeftError(f"--rank has no meaning for --method {found.name}; its options are: {_listed(found)}.")
        if rank is not None and rank != int(rank):
            raise WeftError(f"--rank is {rank:g}: with --method {found.name} give a whole number from 1.")
        return cls(
            found,
            None if rank is None else int(rank),
            found.options({**(found.given if given else {}), **(options or {})}),
        )

    def sized(self, shapes: Mapping[str, tuple[int, int]]) -> int | None:
        """The rank for layers of these shapes. Raises WeftError where a layer cannot have it."""
        if not self.method.ranked:
            return None
        rank = max(1, min(map(min, shapes.values())) // QUARTER) if self.rank is None else self.rank
        for name, (out, inn) in shapes.items():
            most = self.method.limit(out, inn, self.options)
            if not 1 <= rank <= most:
                raise WeftError(
                    f"Rank {rank} is not possible for {self.method.name}: {name} is {out} x {inn}; give 1 to {most}."
                )
        return rank

    def original(self, model: nn.Module) -> nn.Module | None:
        """A frozen copy of the model that is to be restructured, where the method's rules follow it."""
        asked = any("original" in inspect.signature(make).parameters for make in self.method.rules)
        return copy.deepcopy(model).requires_grad_(False).eval() if asked else None

    def rules(self, model: nn.Module, seed: int, original: nn.Module | None = None) -> list[Rule]:
        """What happens around the training steps of a model of this structure; `original` of the model it was."""
        shapes = {name: shape_of(layer) for name, layer in linear_layers(model).items()}
        rank = self.sized(shapes)
        settings = {**self.options, "seed": seed} | ({} if rank is None else {"rank": rank})
        return make_rules(self.method.rules, settings | {"ranks": dict.fromkeys(shapes, rank), "original": original})

    def described(self) -> dict[str, Any]:
        """What a run's record says of it, JSON-able."""
        return {"method": self.method.name, "rank": self.rank, "method_options": dict(self.options)}

    @property
    def uncounted(self) -> list[str]:
        """What its rules hold beside a step that no plan of its memory counts."""
        return [what for make in self.method.rules if (what := getattr(make, "uncounted", ""))]

    @property
    def ends(self) -> str:
        """What comes by the end of a run alone."""
        return ends_of(self.method, self.options)


@dataclass(frozen=True)
class Grafting(Structure):
    """A graft that is trained with the whole model: matrices stay, the forward pass is another."""

    method: Graft  # type: ignore[assignment]
    grafts: ClassVar[bool] = True

    @classmethod
    def of_graft(cls, graft: Graft, rank: float | None, options: Mapping[str, Any], given: bool) -> Grafting:
        """Checked as `Structure.of` does. Raises WeftError for one that is put on a frozen model, too."""
        if not graft.begins:
            raise WeftError(
                f"{graft.name!r} is put on a model whose weights stay as they are: train it by weft finetune --method "
                f"{graft.name}."
            )
        if rank is not None:
            raise WeftError(f"--rank has no meaning for --method {graft.name}; its options are: {_listed(graft)}.")
        chosen = graft.options({"whole": True, **({} if given else graft.fresh), **options})
        if not chosen["whole"]:
            raise WeftError(f"Pre-training trains all weights: {graft.name} alone (whole=false) is weft finetune's.")
        return cls(graft, None, chosen)

    def sized(self, shapes: Mapping[str, tuple[int, int]]) -> int | None:
        return None

    def original(self, model: nn.Module) -> nn.Module | None:
        return None

    def rules(self, model: nn.Module, seed: int, original: nn.Module | None = None) -> list[Rule]:
        return []

    @property
    def uncounted(self) -> list[str]:
        return []


def ends_of(method: Record, given: Mapping[str, Any]) -> str:
    """What comes by the end of a run alone (`weft.rules.Rule.ends`), with what was given, options of the method among
    it; or "".
    """
    options = method.options({name: value for name, value in given.items() if name in method.defaults})
    makers = [make for make in method.rules if getattr(make, "ends", "")] if isinstance(method, Method) else []
    return next((rule.ends for rule in make_rules(makers, options) if rule.ends), "")


def restructure(
    model: nn.Module, method: str | Method | Structure, size: Any = None, seed: int = 0, **options: Any
) -> nn.Module:
    """Put a method's terms in the place of every linear layer of a model, or a graft on it; it is returned.

    Args:
        method: of kind "pretrain", a graft that pre-training can begin with, or a whole structure, which then says size
            and options.
        size: of every layer: for most methods the rank; None for a quarter of the smallest side.
        seed: of every draw.
        options: the method's own.

    Raises:
        WeftError: an unknown method or option, or a size that a layer cannot have. The model is then as it was.
    """
    chosen = method if isinstance(method, Structure) else Structure.of(method, size, options)
    if isinstance(chosen, Grafting):
        return put_graft(model, chosen.method, seed=seed, dtype=next(model.parameters()).dtype, **chosen.options)
    found = chosen.method
    assert found.split is not None
    shapes = {name: shape_of(layer) for name, layer in linear_layers(model).items()}
    rank = chosen.sized(shapes)
    own = torch.Generator().manual_seed(seed)
    shared = None if found.share is None else found.share(shapes, rank, own, chosen.options)
    made = {}
    for name in shapes:
        layer = model.get_submodule(name)
        draw, dtype = generator(seed, found.name, name), layer.weight.dtype
        site = Site(name, base_terms(model, name), rank, rank, {}, draw, dtype, shared, bias_of(layer))  # type: ignore[arg-type]
        made[name] = found.split(site, **_asked(found.split, chosen.options))
    for name, split in made.items():
        if split.terms:
            put(model, name, split.terms, KEEP if split.bias is None else split.bias)
    return model


@torch.no_grad()
def finish(model: nn.Module, structure: Structure) -> None:
    """Make of every trained layer what the structure's method leaves in the end; one matrix is a plain layer again."""
    method = structure.method
    if isinstance(method, Graft) or method.finish is None:
        return
    options = _asked(method.finish, structure.options)
    for name in [name for name, module in model.named_modules() if isinstance(module, SumLinear)]:
        layer = model.get_submodule(name)
        draw, dtype = generator(0, method.name, name), layer.weight.dtype
        split = method.finish(Site(name, base_terms(model, name), None, None, {}, draw, dtype), **options)  # type: ignore[arg-type]
        if is_one_matrix(put(model, name, split.terms)):
            unput(model, name)
    if isinstance(model, PreTrainedModel) and not any(isinstance(m, SumLinear) for m in model.modules()):
        unmark(model)


def _asked(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function names; all of them where it takes any."""
    names = inspect.signature(function).parameters
    several = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    return {name: value for name, value in options.items() if several or name in names}


def _listed(method: Record) -> str:
    return ", ".join(method.defaults) or "none"
