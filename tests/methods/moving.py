"""The terms of a sparse adapter whose entries move."""

from __future__ import annotations

from torch import nn

from weft.terms import MovingSparse
from weft.terms.adapters import find_adapter


def moving_terms(model: nn.Module, adapter: str) -> dict[str, MovingSparse]:
    """layer -> the adapter's term."""
    terms = find_adapter(model, adapter).terms
    return {layer: t for layer, roles in terms.items() for t in roles.values() if isinstance(t, MovingSparse)}
