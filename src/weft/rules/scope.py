"""The terms that a rule works on: an adapter's, or the model's own; and what stands beside them in a layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from weft.terms import SumLinear, Term
from weft.terms.adapters import base_terms, unwrapped

__all__ = ["Terms", "beside", "in_use", "model_terms"]

Terms = Mapping[str, Mapping[str, Term]]
"""layer name -> term name -> term."""


def model_terms(model: nn.Module) -> dict[str, dict[str, Term]]:
    """The model's own terms: those of every sum, without adapters. A plain layer has none."""
    sums = {name: m for name, m in unwrapped(model).named_modules() if isinstance(m, SumLinear)}
    outer = [name for name in sums if not any(name.startswith(other + ".") for other in sums)]
    return {name: base_terms(model, name) for name in outer}


def beside(model: nn.Module, layer: str, terms: Terms) -> list[Term]:
    """The terms of a layer that are neither an adapter's nor in the scope: its frozen rest."""
    mine = {id(term) for term in terms[layer].values()}
    return [term for term in base_terms(model, layer).values() if id(term) not in mine]


def in_use(module: nn.Module, term: Term) -> bool:
    """Whether a layer's sum holds this very term: an adapter's leaves it while another, or none, is chosen."""
    return isinstance(module, SumLinear) and any(other is term for other in module.terms.values())
