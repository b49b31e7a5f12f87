"""Compensate: an adapter that repairs the outputs of a compressed model on chosen data (`weft.methods.eora`).

The model may be compressed in any way and by any tool. The adapter is a LoRA of scale 1: save it for PEFT, merge it, or
train it on. As a part of the weights instead, in one go: `weft.compress(model, ["nf3", "eora"], ...)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.io.quantizer import remark
from weft.methods import METHODS, Method, Site, Split
from weft.methods.base import Moments
from weft.runs.loading import load_model
from weft.seeds import generator
from weft.stats.calibrate import Batch
from weft.stats.walk import walk
from weft.terms import LowRank
from weft.terms.adapters import Adapter, attach, base_terms, detach, unwrapped
from weft.terms.experts import fuse, within_experts
from weft.terms.layers import linear_layers, shape_of, weight_of
from weft.verbs.targets import resolve_targets

__all__ = ["compensate"]


@within_experts
def compensate(
    model: nn.Module,
    original: nn.Module | str | os.PathLike[str],
    batches: Iterable[Batch],
    rank: int = 32,
    targets: str | Sequence[str] = "all-linear",
    name: str = "eora",
    *,
    method: str | Method = "eora",
    dtype: torch.dtype = torch.float32,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
) -> nn.Module:
    """Put the adapter on a compressed model; the same model is returned.

    Args:
        model: compressed in any way, of the original's layers.
        original: the dense model, in memory, in a directory or by its Hub id.
        batches: [{"input_ids", "attention_mask"}, ...] of the data to be good at: the choice is a part of the gain, so
            do not evaluate on it. The published choice is 64 samples of the task, or 256 of a corpus.
        rank: 128 in the paper's commands.
        method: of kind "compensate".
        targets, name, dtype: as in `weft.adapt`.
        track: (blocks, description) -> the same blocks, for a progress bar.

    Raises:
        WeftError: no batches, a rank that is no rank of a layer, layers that the original lacks, a name in use, or
            blocks that are no chain. The model is then as it was.

    Example:
        >>> small = weft.quantize(copy.deepcopy(model), "nf3")
        >>> small = weft.compensate(small, model, batches, rank=4)
    """
    model, data, chosen = unwrapped(model), list(batches), METHODS.find(method, "compensate")
    assert chosen.split is not None
    if not data:
        raise WeftError(
            "The compensation needs data: give batches=[{'input_ids': ...}, ...] of what shall be repaired."
        )
    shapes = {layer: shape_of(module) for layer, module in resolve_targets(model, targets).items()}
    source = original if isinstance(original, nn.Module) else load_model(original, device="cpu", dtype="auto")
    _check(shapes, unwrapped(source), rank)
    terms = {layer: {name: _zeros(model, layer, rank, dtype)} for layer in shapes}
    attach(model, Adapter(name, chosen.name, dict(terms), {"rank": rank}))  # type: ignore[arg-type]
    try:
        for group in walk(model, data, list(shapes), track=track):
            for layer in group.names:
                _fill(
                    terms[layer][name],
                    chosen.split(_site(model, source, chosen, layer, rank, group.moments), **chosen.options({})),
                )
    except BaseException:
        detach(model, name)
        raise
    finally:
        fuse(source)
    remark(model)
    return model


def _zeros(model: nn.Module, layer: str, rank: int, dtype: torch.dtype) -> LowRank:
    """A term that does nothing yet, so that the walk sees the layers after it as they are."""
    out_features, in_features = shape_of(model.get_submodule(layer))
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    B, A = (
        torch.zeros(shape, device=weight.device, dtype=dtype) for shape in ((out_features, rank), (rank, in_features))
    )
    return LowRank.from_factors(B, A)


def _site(model: nn.Module, source: nn.Module, method: Method, layer: str, rank: int, moments: Moments) -> Site:
    """The layer without the adapter, beside what it was in the original."""
    original = weight_of(source.get_submodule(layer), torch.float32)
    own = generator(0, method.name, layer)
    return Site(layer, base_terms(model, layer), rank, rank, moments, own, original=original)


@torch.no_grad()
def _fill(term: LowRank, split: Split) -> None:
    (made,) = split.terms.values()
    term.B.copy_(made.B)
    term.A.copy_(made.A)


def _check(shapes: dict[str, tuple[int, int]], source: nn.Module, rank: int) -> None:
    theirs = {layer: shape_of(module) for layer, module in linear_layers(source).items()}
    for layer, shape in shapes.items():
        if theirs.get(layer) != shape:
            has = f"has it of shape {theirs[layer]}" if layer in theirs else "lacks it"
            raise WeftError(
                f"The layer {layer} {shape} is not the original's, which {has}; give the model that was compressed."
            )
        if not 1 <= rank <= min(shape):
            raise WeftError(
                f"Rank {rank} is not possible on {layer} {shape}; give 1 to {min(shape)}, or leave the layer out with "
                "targets=."
            )
