"""The record of a format that servers read, and what of a model it is given.

A layer in integer codes, or where a format has them in floating-point ones, stays in its codes; low-rank terms beside
them are written as an adapter next to the model; every other sum of terms becomes the dense matrix that it equals.
Whether that can be, exactly, is known before anything is written: `coded_layers` and `Format.unfit` say why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.terms import SumLinear, Term
from weft.terms.base import FloatCodes, IntegerCodes

__all__ = ["TRANSFORMERS", "WITH_ADAPTER", "Coded", "Export", "Format", "Stored", "coded_layers", "nearest", "rounds"]


@dataclass(frozen=True)
class Coded:
    """A layer in codes.

    Args:
        codes: of its base: `IntegerCodes`, or `FloatCodes` where the format has a place for them.
        bias: (out,) or None.
        beside: the terms that a PEFT adapter adds to it.
        transposed: whether it stands for a `Conv1D`.
    """

    codes: Any
    bias: Tensor | None
    beside: Mapping[str, Term]
    transposed: bool = False


class Stored(nn.Module):
    """The tensors of a layer by the names that a format gives them, in the layer's place while the model is saved."""

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        super().__init__()
        for name, tensor in {**tensors, **({} if bias is None else {"bias": bias})}.items():
            self.register_buffer(name, tensor)


@dataclass(frozen=True)
class Export:
    """A model about to be written, its sums of terms replaced by what the format stores of them.

    Args:
        model: with `Stored` layers in the place of those in codes.
        layers: those in codes, by name.
        dtype: of its floating-point tensors.
    """

    model: PreTrainedModel
    layers: Mapping[str, Coded]
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | None = None

    def linear_names(self) -> list[str]:
        """The model's layers that are dense `nn.Linear`s, the output head included."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]


TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained("path-of-this-directory")
```"""
"""How transformers opens a directory."""

WITH_ADAPTER = """Low-rank factors stand beside its codes: the model is this with the adapter in `peft/`, which servers
add as well.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path-of-this-directory")
PeftModel.from_pretrained(model, "path-of-this-directory/peft")
```"""
"""How a directory is opened that has factors beside its codes."""


def no_check(*found: Any) -> None:
    """Any will do."""


def no_tensors(layers: Mapping[str, Coded], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Nothing is stored of layers in codes beside what `write` writes."""
    return {name: {} for name in layers}


def no_caution(layers: Mapping[str, Coded]) -> None:
    """Every reader takes it."""


def no_config(export: Export) -> None:
    """The configuration says nothing of codes."""


def no_files(config: dict[str, Any]) -> dict[str, Any]:
    """No further files."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Args:
        name: as on the command line.
        summary: what it is, in a line.
        holds: which structures it holds exactly.
        reads: what opens it.
        library: that the Hub shows it under.
        usage: how it is opened, as Markdown; `with_adapter`: with the factors that stand beside codes.
        caution: (layers in codes) -> a sentence on what a reader of it gets wrong, or None.
        package: that must be installed to write it, with the extra that brings it.
        dtypes: of the model's floating-point tensors; None for any.
        check: (architecture, configuration) -> None, or WeftError where the architecture has no place in the format.
        check_tokenizer: the same of the tokenizer.
        floats: whether it holds floating-point codes beside integer ones.
        unfit: (codes, dtype) -> why a layer's codes cannot be held exactly in a model of that dtype, as half a
            sentence; None where they can. None for a format without codes.
        tensors: (layers in codes, dtype) -> by layer, the tensors that are stored for it, by name.
        config: (export) -> the `quantization_config` of config.json.
        files: (that configuration) -> further JSON files by name.
        codes_only: whether a model without a layer in codes has no place in it.
        write: (export, directory) -> None writes the model; None for safetensors files as transformers writes them.
        adapter: (model, low-rank terms by layer, directory) -> None writes the adapters on a model, or its factors
            beside codes, in a format that holds these and not the model.
        beside: the same writes the factors beside codes next to the model; None for an adapter of PEFT in `peft/`.
    """

    name: str
    summary: str
    holds: str
    reads: str
    library: str = "transformers"
    usage: str = TRANSFORMERS
    with_adapter: str = WITH_ADAPTER
    caution: Callable[[Mapping[str, Coded]], str | None] = no_caution
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    check: Callable[[str, PreTrainedConfig], None] = no_check
    check_tokenizer: Callable[[PreTrainedTokenizerBase], Any] = no_check
    floats: bool = False
    unfit: Callable[[Any, torch.dtype], str | None] | None = None
    tensors: Callable[[Mapping[str, Coded], torch.dtype], Mapping[str, Mapping[str, Tensor]]] = no_tensors
    config: Callable[[Export], dict[str, Any] | None] = no_config
    files: Callable[[dict[str, Any]], Mapping[str, Any]] = no_files
    codes_only: bool = False
    write: Callable[[Export, Path], None] | None = None
    adapter: Callable[[PreTrainedModel, Mapping[str, Mapping[str, Term]], Path], None] | None = None
    beside: Callable[[PreTrainedModel, Mapping[str, Mapping[str, Term]], Path], None] | None = None


def coded_layers(model: nn.Module, floats: bool = False) -> dict[str, Coded]:
    """The layers with a term in integer codes, and with `floats` in floating-point ones, by name.

    Raises:
        WeftError: beside a layer's codes stands a term that no adapter of PEFT can add.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SumLinear):
            continue
        codes = {key: made for key, term in layer._named_terms() if (made := _codes(term, floats)) is not None}
        if len(codes) == 1:
            beside = {key: term for key, term in layer._named_terms() if key not in codes}
            odd = next((term for term in beside.values() if term.lora() is None), None)
            if odd is not None:
                raise WeftError(
                    f"{name} has a term of kind {odd.kind!r} beside its codes, which no adapter of PEFT can add; "
                    "--format hf writes their sum as a dense matrix."
                )
            (made,) = codes.values()
            found[name] = Coded(made, layer.bias, beside, layer.transposed)
    return found


def _codes(term: Term, floats: bool) -> IntegerCodes | FloatCodes | None:
    codes = term.exact_codes()
    return term.exact_floats() if codes is None and floats else codes


def nearest(inputs: int, group: int) -> str:
    """The group that one may ask for instead, in brackets; nothing where there is none."""
    common = math.gcd(inputs, group)
    return f" (those of {common} divide them: weft compress --option group={common})" if common > 1 else ""


def rounds(scales: Tensor, dtype: torch.dtype) -> str | None:
    """Why scales cannot be stored in `dtype`, as half a sentence; None where every one is a number of it."""
    if torch.equal(scales.to(dtype).to(scales.dtype), scales):
        return None
    return f"its scales are no numbers of {str(dtype).removeprefix('torch.')}"
