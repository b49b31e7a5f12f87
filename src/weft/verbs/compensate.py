"""Compensate: a low-rank adapter that repairs the outputs of a compressed model on chosen data (EoRA, 2024, arXiv
2410.21271).

    min over B A of rank r:  tr((dW - B A) C (dW - B A)^T),   dW = W - W_c (out, in),   C = E[x x^T] (in, in)
    U = leading r eigenvectors of dW C dW^T;   B = U,   A = U^T dW;   y = W_c x + B (A x)

with x the layer's inputs in the compressed model, all layers before it compensated already. No root or inverse of C is
taken, so that fewer tokens than channels are no special case and ||B A||_2 <= ||dW||_2. W_c is whatever the layer
computes now: codes, a pruned matrix, low-rank factors. The adapter is a LoRA of scale 1: save it for PEFT, merge it, or
train it on.
Deviations: the inverse-free form (the official code divides by eigenvalues and replaces negative ones); a plain mean
for C (the official one discounts early batches); the components' size is shared evenly between B and A.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.io.quantizer import remark
from weft.linalg.principal import principal_factors
from weft.runs.loading import load_model
from weft.stats.calibrate import Batch
from weft.stats.walk import walk
from weft.terms import LowRank
from weft.terms.adapters import Adapter, attach, base_terms, detach, sum_dense, unwrapped
from weft.terms.layers import linear_layers, shape_of, weight_of
from weft.verbs.adapt import resolve_targets

__all__ = ["compensate"]


def compensate(
    model: nn.Module,
    original: nn.Module | str | os.PathLike[str],
    batches: Iterable[Batch],
    rank: int = 32,
    targets: str | Sequence[str] = "all-linear",
    name: str = "eora",
    *,
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
        targets, name, dtype: as in `weft.adapt`.
        track: (blocks, description) -> the same blocks, for a progress bar.

    Raises:
        WeftError: no batches, a rank that is no rank of a layer, layers that the original lacks, a name in use, or
            blocks that are no chain. The model is then as it was.
    """
    model, data = unwrapped(model), list(batches)
    if not data:
        raise WeftError(
            "The compensation needs data: give batches=[{'input_ids': ...}, ...] of what shall be repaired."
        )
    shapes = {layer: shape_of(module) for layer, module in resolve_targets(model, targets).items()}
    source = original if isinstance(original, nn.Module) else load_model(original, device="cpu", dtype="auto")
    _check(shapes, unwrapped(source), rank)
    terms = {layer: {name: _zeros(model, layer, rank, dtype)} for layer in shapes}
    attach(model, Adapter(name, "eora", dict(terms), {"rank": rank}))  # type: ignore[arg-type]
    try:
        for group in walk(model, data, list(shapes), track=track):
            for layer in group.names:
                _fill(terms[layer][name], _error(model, source, layer), group.moments["input_moment"])
    except BaseException:
        detach(model, name)
        raise
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


def _error(model: nn.Module, source: nn.Module, layer: str) -> Tensor:
    """dW (out, in) in fp32: what the compressed layer lacks."""
    now = sum_dense(base_terms(model, layer).values())
    return weight_of(source.get_submodule(layer), torch.float32).to(now.device) - now


@torch.no_grad()
def _fill(term: LowRank, error: Tensor, moment: Tensor) -> None:
    B, A, _ = principal_factors(error, C=moment.to(error.device))
    term.B.copy_(B[:, : term.rank])
    term.A.copy_(A[: term.rank])


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
