"""What a pre-training run begins with: a fresh model of some size, or a trained one that is given (`--from`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from weft.embedded.text import default_text
from weft.errors import WeftError
from weft.io.adapter_places import is_adapter
from weft.methods import METHODS
from weft.optim.mup import scale_init_
from weft.runs.loading import load_config, load_model
from weft.terms.coverage import untrained
from weft.train.sizes import configuration, fresh_model
from weft.train.sources import read_texts
from weft.train.windows import evaluation_windows, token_stream
from weft.verbs.evaluate import check_causal, check_context
from weft.verbs.fresh import Structure, restructure

__all__ = ["build", "check_beginning", "check_held_out", "emptied", "given_model", "held_out"]


def build(
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    seed: int,
    *,
    given: PreTrainedModel | None = None,
    structure: Structure | None = None,
    mup: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, nn.Module | None]:
    """A fresh model of a published size, and, for width scaling, its narrow base on the meta device.

    Args:
        given: a model to begin with instead, which is then changed in place; size, tokenizer, window and dtype have no
            meaning then.
        structure: what stands in the place of the blocks' matrices.
        mup: the width of the base model on which lr and weight decay were tuned; initial weights are scaled
            accordingly.
        device: where the finished model goes; None for where it was made.
    """
    model = given
    base: nn.Module | None = None
    if model is None:
        model = fresh_model(configuration(size, tokenizer, window), seed, dtype=dtype)
    if mup is not None:
        if structure is not None:
            raise WeftError("--mup scales dense matrices: give it without --low-rank or --method.")
        with torch.device("meta"):
            base = LlamaForCausalLM(configuration(size, tokenizer, window, width=mup))
        scale_init_(model, base)
    if structure is not None:
        restructure(model, structure, seed=seed)
    return model if device is None else model.to(device), base  # type: ignore[arg-type]


def check_beginning(
    given: str | None, size: str | None, tokenizer: str | None, mup: int | None, structure: Structure | None
) -> tuple[str, str]:
    """The size of a fresh model, and the model whose tokenizer is taken.

    Raises WeftError where what a run begins with is not said, said twice, or not what the method begins with.
    """
    if given is not None:
        for name, value in (("size", size), ("mup", mup)):
            if value is not None:
                raise WeftError(f"--{name} is for a fresh model, and --from goes on with {given}: give one of the two.")
        if tokenizer is not None:
            raise WeftError(f"--from {given} brings its own tokenizer: leave out --tokenizer.")
        if is_adapter(given):
            raise WeftError(f"{given} is an adapter; merge it first (weft merge), and give the merged model to --from.")
    if structure is not None:
        _check_method(structure, given, size)
    return size or "9m", given or tokenizer or "pico"


def _check_method(structure: Structure, given: str | None, size: str | None) -> None:
    name, begins = structure.method.name, structure.method.begins
    if given is not None and "given" not in begins:
        able = ", ".join(
            key for key, method in METHODS.items() if method.kind == "pretrain" and "given" in method.begins
        )
        raise WeftError(
            f"--method {name} draws its own weights and would read none of {given}: give --size instead of --from, or "
            f"one of these methods: {able}."
        )
    if given is None and begins[0] == "given" and (size is None or "fresh" not in begins):
        other = "; --size SIZE begins with a fresh one" if "fresh" in begins else ""
        raise WeftError(f"--method {name} goes on with a trained model: give --from MODEL{other}.")


def given_model(
    name: str, window: int, device: torch.device, dtype: str | None, structure: Structure | None
) -> PreTrainedModel:
    """The model that training shall go on with, every parameter trainable. Raises WeftError where it is none for it."""
    config = load_config(name)
    check_causal(config)
    check_context(config, window)
    model = load_model(name, device=device, dtype=dtype)
    _check_trainable(model, structure)
    return model


def _check_trainable(model: nn.Module, structure: Structure | None) -> None:
    """Raises WeftError where every weight is to be trained, and matrices are in codes that no step changes."""
    fixed = untrained(model) if structure is None else []
    if fixed:
        raise WeftError(
            f"--from goes on with every weight, and {len(fixed)} matrices of this model are in codes that no step "
            f"changes ({fixed[0]} ...); train an adapter (weft finetune --method lora), or make plain weights of it "
            "first: weft merge."
        )


def held_out(text: str | Path | Sequence[str | Path] | None, model: str | None) -> list[str] | None:
    """The text that judges; by default Python's held-out sources, which say little of a model that is given."""
    if text is not None:
        return read_texts(text)
    return [default_text("evaluation")] if model is None else None


def check_held_out(
    texts: list[str] | None, tokenizer: PreTrainedTokenizerBase, window: int, windows: int | None
) -> None:
    """Raises WeftError for a text that is too short, or windows of none."""
    if texts is not None:
        evaluation_windows(len(token_stream(tokenizer, texts)), window, count=windows)
    elif windows is not None:
        raise WeftError("--eval-windows is for a text that judges: give --eval-text.")


def emptied(model: PreTrainedModel) -> PreTrainedModel:
    """The model without storage: shapes and dtypes alone, on the meta device."""
    held = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, held | {id(buffer): buffer.to("meta") for buffer in model.buffers()})
