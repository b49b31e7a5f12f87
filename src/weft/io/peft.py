"""PEFT's adapter files, read and written without PEFT.

What is written is safe for the strictest readers: vLLM (0.11) ignores rank and alpha patterns and applies one
lora_alpha / r, llama.cpp's converter reads only the global lora_alpha and stops at any tensor that is neither lora_A
nor lora_B. So the scale is folded into B, lora_alpha = r, and every layer has one rank, padded with zeros.

Whole modules that are trained along (a classifier, a table of tokens) are PEFT's `modules_to_save`, single rows of a
table its `trainable_token_indices`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.errors import WeftError
from weft.io.base import Base
from weft.io.peft_config import CONFIG, read_config
from weft.io.peft_names import PREFIX, ROWS, Parts, sort_tensors
from weft.tensors import read_tensors
from weft.terms import LowRank, Magnitude, Term
from weft.terms.adapters import Adapter
from weft.terms.base import Lora
from weft.terms.experts import names_an_expert

__all__ = ["CONFIG", "TENSORS", "plain_state", "read", "why_not_peft", "write"]

TENSORS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


def why_not_peft(adapter: Adapter) -> str | None:
    """Why the adapter has no exact form in PEFT's LoRA files, as half a sentence; None where it has one."""
    modules = _modules(adapter.extras)
    alone = next((key for key in adapter.extras if key.rpartition(".")[0] not in modules), None)
    if alone is not None:
        return f"it trains parameters of the model itself too ({alone})"
    expert = next(filter(names_an_expert, adapter.terms), None)
    if expert is not None:
        return f"{expert} is a layer to weft, and in a plain model a part of one tensor of all experts"
    rescaled = set()
    for layer, terms in adapter.terms.items():
        # each for itself and not their sum, which cannot be taken of sharded and plain tensors
        forms = [term.lora() for term in terms.values()]
        lengths = [form.magnitude is not None for form in forms if form is not None]
        if None in forms or (any(lengths) and len(forms) > 1):
            kinds = ", ".join(dict.fromkeys(term.kind for term in terms.values()))
            return f"its delta on {layer} ({kinds}) is no product of two thin matrices"
        rescaled.add(any(lengths))
    return "it rescales the rows of some layers and not of others" if len(rescaled) > 1 else None


def write(
    directory: Path, base: Base, adapter: Adapter, terms: Mapping[str, list[Term]], extras: Mapping[str, Tensor]
) -> bool:
    """Write PEFT's two files.

    Args:
        terms: layer -> the adapter's terms, holding whole tensors.
        extras: its values of parameters of the model, whole.

    Returns:
        Whether these tensors are the adapter itself, bit for bit.
    """
    forms = {layer: _lora(found) for layer, found in terms.items()}
    rank = max(form.A.shape[0] for form in forms.values())
    state = {_extra_key(key, adapter): tensor.contiguous() for key, tensor in extras.items()}
    for key in _tables(base, adapter):  # PEFT looks for a tied table under each of its names
        state |= {f"{PREFIX}{tied}": extras[key].clone() for tied in base.tied}
    for layer, (B, A, magnitude, _) in forms.items():
        state[f"{PREFIX}{layer}.lora_A.weight"] = F.pad(A, (0, 0, 0, rank - A.shape[0])).contiguous()
        state[f"{PREFIX}{layer}.lora_B.weight"] = F.pad(B, (0, rank - B.shape[1])).contiguous()
        if magnitude is not None:
            state[f"{PREFIX}{layer}.lora_magnitude_vector"] = magnitude.contiguous()
    save_file(state, directory / TENSORS, metadata={"format": "pt"})
    dora, dropout = any(f.magnitude is not None for f in forms.values()), max(f.dropout for f in forms.values())
    config = _config(base, list(terms), rank, dora, dropout) | _along(base, adapter)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return all(_is_itself(found, forms[layer], rank) for layer, found in terms.items())


def plain_state(path: Path, layers: Iterable[str], adapter: Adapter, extras: Iterable[str]) -> dict[str, Tensor]:
    """PEFT's tensors under the names of our own format, for an adapter that `write` found to be itself."""
    state = read_tensors(path / TENSORS)
    parts = {"A": "lora_A.weight", "B": "lora_B.weight"}
    terms = {
        f"{layer}.main.{name}": state[f"{PREFIX}{layer}.{part}"] for layer in layers for name, part in parts.items()
    }
    return terms | {key: state[_extra_key(key, adapter)] for key in extras}


def read(path: Path, name: str, model: nn.Module | None = None) -> tuple[Adapter, Base]:
    """The adapter of PEFT's files, with its values of parameters of the model (biases, modules_to_save), and its base.

    Args:
        model: whose parameters alone there may be values of, and whose names stand for those that transformers gave
            them in the past; None for any.

    Raises:
        WeftError: another kind of adapter, one whose configuration says what weft cannot honour, or tensors that are
        missing or unexpected.
    """
    config = read_config(path)
    found = sort_tensors(_tensors(path), config, model, path)
    adapter = Adapter(name, "dora" if config.get("use_dora") else "lora", {}, {"rank": config["r"], "peft": True})
    for layer, parts in found.layers.items():
        adapter.terms[layer] = {name: _term(layer, found.source[layer], parts, config, path)}
    adapter.extras, adapter.apart, adapter.rows = found.extras, found.apart, found.rows
    return adapter, _base(config)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The adapter's tensors; a pickled file is read with weights_only, which builds nothing but tensors."""
    try:
        if not (path / TENSORS).is_file() and (path / PICKLED).is_file():
            pickled: dict[str, Tensor] = torch.load(path / PICKLED, map_location="cpu", weights_only=True)
            return pickled
        return read_tensors(path / TENSORS)
    except Exception as error:  # safetensors, pickle and the system each have their own
        raise WeftError(
            f"The adapter in {path} is damaged or incomplete ({' '.join(str(error).split())}); fetch it again."
        ) from error


def _modules(extras: Iterable[str]) -> list[str]:
    """The modules whose weight is among the parameters."""
    return [key.removesuffix(".weight") for key in extras if key.endswith(".weight")]


def _extra_key(key: str, adapter: Adapter) -> str:
    return f"{PREFIX}{key.removesuffix('weight')}{ROWS}" if key in adapter.rows else f"{PREFIX}{key}"


def _tables(base: Base, adapter: Adapter) -> list[str]:
    """The input embedding, where the adapter trains all of it and a tied head with it."""
    whole = adapter.extras.keys() - adapter.rows.keys() - set(adapter.apart)
    return [key for key in whole if key.removesuffix(".weight") in base.samples]


def _along(base: Base, adapter: Adapter) -> dict[str, Any]:
    """The fields that say what of the model itself the adapter trains along."""
    tables = [key.removesuffix(".weight") for key in _tables(base, adapter)]
    whole = [module for module in _modules(adapter.extras) if f"{module}.weight" not in adapter.rows]
    return {
        # PEFT ties an embedding by its bare name alone, and takes any module whose name ends in the one given
        "modules_to_save": [m.rpartition(".")[2] if m in tables else m for m in whole] or None,
        "trainable_token_indices": {key.removesuffix(".weight"): rows for key, rows in adapter.rows.items()} or None,
        "ensure_weight_tying": bool(tables),
    }


def _lora(terms: list[Term]) -> Lora:
    """The terms of a layer as one LoRA: factors side by side, ranks add up."""
    forms = [form for term in terms if (form := term.lora()) is not None]
    assert len(forms) == len(terms)
    if len(forms) == 1:
        return forms[0]
    B, A = torch.cat([form.B for form in forms], dim=1), torch.cat([form.A for form in forms])
    return Lora(B, A, dropout=max(form.dropout for form in forms))


def _is_itself(terms: list[Term], form: Lora, rank: int) -> bool:
    """Whether the terms are one that has the file's two tensors for its state, bit for bit."""
    state = terms[0].own_state() if len(terms) == 1 else {}
    wanted = {"A": form.A, "B": form.B}
    return (
        state.keys() == wanted.keys()
        and form.A.shape[0] == rank
        and all(state[key].dtype == tensor.dtype and torch.equal(state[key], tensor) for key, tensor in wanted.items())
    )


def _config(base: Base, layers: list[str], rank: int, dora: bool, dropout: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": base.task,
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": dropout,
        "use_rslora": False,
        "use_dora": dora,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": base.transposed,
        "target_modules": list(base.targets) or sorted(layers),
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _base(config: Mapping[str, Any]) -> Base:
    """What the config tells of its base; targets only where they mean all layers of these names."""
    targets = config.get("target_modules")
    plain = isinstance(targets, list) and not (config.get("layers_to_transform") or config.get("exclude_modules"))
    return Base(
        config.get("base_model_name_or_path"),
        config.get("task_type"),
        bool(config.get("fan_in_fan_out")),
        tuple(sorted(targets)) if plain and targets else (),
    )


def _term(layer: str, source: str, parts: Parts, config: Mapping[str, Any], path: Path) -> Term:
    """One layer's term; `source` is its name in the file, which patterns match."""
    wanted = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if parts.keys() != wanted:
        odd = min(parts.keys() ^ wanted)
        raise WeftError(
            f"{path}: the tensor {layer}.{odd} is {'missing' if odd in wanted else 'unexpected'}; fetch the adapter "
            "again, whole."
        )
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    rank = _by_pattern(config.get("rank_pattern"), source, config["r"])
    if A.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise WeftError(
            f"{path}: {layer} has factors {tuple(B.shape)} and {tuple(A.shape)}, and the config says rank {rank}; "
            "fetch it again."
        )
    alpha = _by_pattern(config.get("alpha_pattern"), source, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    term = LowRank.from_factors(B, A, scale=scale, dropout=config.get("lora_dropout") or 0.0)
    if "lora_magnitude_vector" not in parts:
        return term
    rescaled = Magnitude(term.in_features, term.out_features, term, dtype=A.dtype)
    rescaled.magnitude = nn.Parameter(parts["lora_magnitude_vector"])
    return rescaled


def _by_pattern(pattern: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the layer's name, as PEFT has it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default
