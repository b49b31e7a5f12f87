"""Structured weights from scratch: a method of kind "pretrain" makes the layers of a fresh model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.methods import METHODS, Method, Site
from weft.seeds import generator
from weft.terms.adapters import base_terms
from weft.terms.layers import bias_of, linear_layers, shape_of
from weft.terms.put import KEEP, put

__all__ = ["restructure"]


def restructure(model: nn.Module, method: str | Method, size: Any, seed: int, **options: Any) -> nn.Module:
    """Put a method's terms in the place of every linear layer of a fresh model, whose weights are not read; the same
    model is returned.

    Args:
        method: of kind "pretrain".
        size: of every layer: for most methods the rank.
        seed: of every draw.
        options: the method's own.

    Raises:
        WeftError: an unknown method or option, or a size that a layer cannot have. The model is then as it was.
    """
    found = METHODS.find(method, "pretrain")
    assert found.split is not None
    chosen = found.options(options)
    shapes = {name: shape_of(layer) for name, layer in linear_layers(model).items()}
    for name, (out, inn) in shapes.items():
        most = found.limit(out, inn, chosen)
        if not 1 <= size <= most:
            raise WeftError(f"Rank {size} is not possible for {found.name}: {name} is {out} x {inn}; give 1 to {most}.")
    own = torch.Generator().manual_seed(seed)
    shared = None if found.share is None else found.share(shapes, size, own, chosen)
    for name in shapes:
        layer = model.get_submodule(name)
        draw, dtype = generator(seed, found.name, name), layer.weight.dtype
        site = Site(name, base_terms(model, name), size, size, {}, draw, dtype, shared, bias_of(layer))  # type: ignore[arg-type]
        made = found.split(site, **chosen)
        put(model, name, made.terms, KEEP if made.bias is None else made.bias)
    return model
