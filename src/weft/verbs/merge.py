"""Merge: every sum of terms becomes one matrix again, and the model a plain one that anything reads.

    W = T_1 + ... + T_k        added in fp32 or wider, cast to the layer's dtype last

Active adapters are terms of their sums, so they are merged too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.io.adapter_places import check_terms, is_adapter
from weft.io.adapters import load_adapter
from weft.io.plain import check_matrices, make_room, room_for_biases
from weft.io.quantizer import sum_specs, unmark
from weft.io.save import save_model
from weft.progress import say, track
from weft.runs.loading import (
    has_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    resolve_device,
    resolve_dtype,
)
from weft.runs.output import check_output, open_output
from weft.runs.record import begin
from weft.terms import SumLinear
from weft.terms.adapters import forget
from weft.terms.coded_embedding import embedding_specs, plain_embeddings
from weft.terms.coverage import coverage_of
from weft.terms.experts import fuse
from weft.terms.extras import tables
from weft.terms.hooks import check_at_hand
from weft.terms.layers import replace
from weft.verbs.adapters import check_ungrafted, merge_adapter
from weft.verbs.evaluate import model_size

__all__ = ["merge", "run"]

Model = TypeVar("Model", bound=nn.Module)
NOTABLE = 0.1
"""Share of an update whose loss is worth a word."""


@torch.no_grad()
def merge(model: Model) -> Model:
    """Replace every `SumLinear`, in place, by the plain `nn.Linear` or `Conv1D` it equals, and tables of tokens in
    codes by dense ones; returns the model.

    Raises:
        WeftError: the model has no sum of terms, or a graft, which is none; a layer is no matrix, or has got a bias
            that a plain model has no place for. The model is then as it was.

    Example:
        >>> done = weft.compress(model, "svd", budget=0.6)
        >>> plain = weft.merge(model)
    """
    check_ungrafted(model)
    names = [name for name, module in model.named_modules() if isinstance(module, SumLinear)]
    if not names and not embedding_specs(model):
        raise WeftError(f"This {type(model).__name__} has no sum of terms to merge: every layer is plain already.")
    check_at_hand(model, names)
    check_matrices(model, names)
    room = room_for_biases(model)
    plain_embeddings(model)  # and a head of its own with them
    for name in track(names, "merging"):
        layer = model.get_submodule(name)
        if isinstance(layer, SumLinear):
            replace(model, name, layer.collapse())
    make_room(model, room)
    fuse(model)
    if isinstance(model, PreTrainedModel):
        unmark(model)
    forget(model)
    return model


def run(
    model: str,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`weft merge`: read a weft model, write a plain dense one, with `run.json` and a model card.

    Args:
        model: a directory, Hub id or embedded name; or an adapter's directory, to be merged into the base it names.
        adapter: directory of an adapter, ours or PEFT's, to put on first; the model may then be a plain one. Where it
            brings a tokenizer, that one is written, and where it brings larger tables of tokens, the model gets them.
            The metrics tell what share of its update the cast to the model's dtype loses.
        device: to add the terms on; None for the GPU where there is one.
        dtype: of the merged model; None for the one it is stored in.

    Raises:
        WeftError: `model` is no weft model, or any other argument that cannot work, before the model is loaded.
    """
    arguments = {key: value for key, value in locals().items() if key != "device"}
    check_output(out, arguments)
    target = resolve_device(device)
    wanted = None if dtype is None else resolve_dtype(dtype, target)
    if adapter is None and is_adapter(model):
        model, adapter = resolve(model), model
    if adapter is None:
        _check_sums(model, trust_remote_code)
    else:
        check_terms(adapter)
    record = begin("merge", arguments, device=target)
    # asked for another dtype, the sums are taken in fp32, which holds every stored one, and cast afterwards
    source = load_model(
        model, device=target, dtype="auto" if wanted is None else "float32", trust_remote_code=trust_remote_code
    )
    tokenizer = _tokenizer(model, adapter, trust_remote_code)
    before = model_size(source)
    check_ungrafted(source)
    lost = {} if adapter is None else merge_adapter(load_adapter(source, adapter))
    _check_rows(source, tokenizer)
    covered = coverage_of(source, {*lost, *sum_specs(source)}).facts()
    sums = sum(isinstance(module, SumLinear) for module in source.modules())
    with open_output(out, arguments) as place:
        merge(source) if sums or embedding_specs(source) else unmark(source)
        if wanted is not None:
            source.to(wanted)  # type: ignore[arg-type]
        metrics: dict[str, Any] = {
            "matrices": sums + len(lost),
            **_sizes("_before", before),
            **_sizes("", model_size(source)),
            **covered,
        }
        if lost:
            metrics["update_lost"] = max(lost.values())
            if metrics["update_lost"] > NOTABLE:
                say(
                    f"The cast to {source.dtype} loses {metrics['update_lost']:.0%} of the update in the worst layer: "
                    "merge with --dtype float32, or keep the adapter apart."
                )
        save_model(source, tokenizer, place.path, run=record.write(place.path, metrics), max_shard_size=max_shard_size)
    return {"output": str(out), **metrics}


def _check_sums(model: str, trust_remote_code: bool) -> None:
    marks = getattr(load_config(model, trust_remote_code=trust_remote_code), "quantization_config", None) or {}
    if marks.get("quant_method") != "weft":
        raise WeftError(f"{model} has no sum of terms to merge: it is a plain model already.")


def _tokenizer(model: str, adapter: str | Path | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The adapter's own, with its template, where it brings one; else the model's."""
    try:
        home = model if adapter is None or not has_tokenizer(adapter) else str(adapter)
        return load_tokenizer(home, trust_remote_code=trust_remote_code)
    except WeftError as error:  # a vision model has none
        say(f"The merged model is written without a tokenizer: {error}")
        return None


def _check_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    embedding, _ = tables(model)
    rows = None if embedding is None else getattr(embedding, "num_embeddings", len(embedding.weight))  # type: ignore[arg-type]
    if tokenizer is not None and rows is not None and len(tokenizer) > rows:
        raise WeftError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {rows} rows for them, and the adapter brings no "
            "larger table; merge it with the tokenizer that it was trained with."
        )


def _sizes(suffix: str, size: Sequence[int]) -> dict[str, int]:
    return dict(zip((f"parameters{suffix}", f"bytes{suffix}"), size, strict=True))
