"""The names of PEFT's tensors: what each is of, by today's names of the model.

base_model.model.<layer>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector      an update
base_model.model.<module>.<parameter>                                               a module trained along, a bias
base_model.model.<table>.token_adapter.trainable_tokens_delta                       rows of a table of tokens
base_model.model.<table>.token_adapter.base_layer.weight                            all of a resized table
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from weft.errors import WeftError
from weft.terms.extras import tables

__all__ = ["PREFIX", "ROWS", "Found", "Parts", "sort_tensors"]

PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
Parts = dict[str, Tensor]
"""One layer's tensors: "lora_A.weight" (r, in), "lora_B.weight" (out, r), "lora_magnitude_vector" (out,)."""

_LAYER = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_WRAPPED = re.compile(r"\.(modules_to_save|token_adapter\.base_layer|base_layer)\.")
_NEW_HEADS = {"classifier", "score", "qa_outputs"}
"""Names that PEFT lists for a task's head whether the model has them or not."""


@dataclass
class Found:
    """The tensors of a PEFT adapter, by the model's names."""

    layers: dict[str, Parts] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)  # layer -> its name in the file
    extras: dict[str, Tensor] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)  # extras that stay apart where the base ties them
    rows: dict[str, list[int]] = field(default_factory=dict)  # extras of which there are these rows only


def sort_tensors(state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module | None, path: Path) -> Found:
    """Say of each tensor what it is of.

    Raises:
        WeftError: a tensor has no place, or what the configuration names is missing.
    """
    found, rename = Found(), _renamer(model)
    parameters = None if model is None else {name for name, _ in model.named_parameters(remove_duplicate=False)}
    changed: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in state.items():
        bare = key.removeprefix(PREFIX)
        match = _LAYER.fullmatch(bare)
        if match:
            layer = rename(match["layer"])
            found.layers.setdefault(layer, {})[match["part"]] = tensor
            found.source[layer] = match["layer"]
            continue
        if ".original_module." in bare:  # the base's own, which early versions of PEFT stored too
            continue
        bare = _WRAPPED.sub(".", bare)
        own = rename(bare.replace(ROWS, "weight"))
        if "lora_embedding" in bare or (parameters is not None and own not in parameters):
            what = "an update of an embedding" if "lora_embedding" in bare else "which weft has no place for"
            raise WeftError(f"{path} holds the tensor {key}, {what}; nothing was loaded. Use it in PEFT.")
        if bare.endswith(ROWS):
            changed[own] = bare.removesuffix("." + ROWS), tensor
        else:
            found.extras[own] = tensor
            if _named(bare, config.get("modules_to_save") or ()) and not config.get("ensure_weight_tying"):
                found.apart.append(own)
    for own, (table, rows) in changed.items():
        _add_rows(found, own, table, rows, config, model)
    _drop_base(found, model, path)
    _check_present(config, {*state}, path)
    return found


def _drop_base(found: Found, model: nn.Module | None, path: Path) -> None:
    """A head that is adapted comes with its own base; let go of it where it is the model's."""
    for own in [f"{layer}.weight" for layer in found.layers if f"{layer}.weight" in found.extras]:
        stored = found.extras.pop(own)
        there = None if model is None else model.get_parameter(own).detach().to("cpu", stored.dtype)
        if there is not None and (there.shape != stored.shape or not torch.allclose(there, stored, rtol=1e-2)):
            raise WeftError(
                f"{path} adapts {own.removesuffix('.weight')} of other weights than this model's; load it on the model "
                "that it was made for."
            )


def _add_rows(
    found: Found, own: str, table: str, values: Tensor, config: Mapping[str, Any], model: nn.Module | None
) -> None:
    """Rows of a table, into the whole of it where the adapter brings that too."""
    said = config.get("trainable_token_indices") or []
    listed = said if isinstance(said, Mapping) else {table: said}
    rows = next((listed[name] for name in listed if _is(table, name)), next(iter(listed.values()), []))
    if len(rows) != len(values):
        raise WeftError(
            f"The adapter has {len(values)} rows of {own}, and its config names {len(rows)}; fetch it again."
        )
    if own in found.extras:
        found.extras[own] = found.extras[own].index_copy(0, torch.tensor(rows), values)
        return
    found.extras[own], found.rows[own] = values, list(rows)
    # PEFT carries rows of the embedding over to a tied head, but not those of a head, nor where both have their own
    several = len({tuple(indices) for indices in listed.values()}) > 1
    if isinstance(said, Mapping) and not config.get("ensure_weight_tying") and (several or not _is_input(model, own)):
        found.apart.append(own)


def _is_input(model: nn.Module | None, own: str) -> bool:
    """Whether this is the weight of the model's input embedding; no other place of a tied one."""
    embedding = None if model is None else tables(model)[0]
    return model is None or model.get_submodule(own.removesuffix(".weight")) is embedding


def _named(bare: str, modules: Iterable[str]) -> bool:
    """Whether the parameter lies in one of the modules, as PEFT matches their names."""
    parts = bare.split(".")
    return any(_is(".".join(parts[:end]), name) for name in modules for end in range(1, len(parts)))


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _check_present(config: Mapping[str, Any], keys: Iterable[str], path: Path) -> None:
    """Refuse an adapter that lacks what its configuration says it trained along."""
    for name in config.get("modules_to_save") or ():
        if name not in _NEW_HEADS and not any(f".{name}." in key for key in keys):
            raise WeftError(
                f"{path} trained {name} along (modules_to_save), and its tensors are missing; fetch it again."
            )
    if config.get("trainable_token_indices") and not any(key.endswith(ROWS) for key in keys):
        raise WeftError(
            f"{path} trained rows of tokens (trainable_token_indices), and they are missing; fetch it again."
        )


def _renamer(model: nn.Module | None) -> Callable[[str], str]:
    """A name that the model has stays; another is read as one of an earlier transformers, by its own table of those."""
    if not isinstance(model, PreTrainedModel):
        return lambda name: name
    modules = {name for name, _ in model.named_modules()}
    there = modules | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]

    def rename(name: str) -> str:
        if name in there:
            return name
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, dict.fromkeys(there))
        return renamed if renamed in there else name

    return rename
