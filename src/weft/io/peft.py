"""PEFT's adapter files, read and written without PEFT.

What is written is safe for the strictest readers: vLLM (0.11) ignores rank and alpha patterns and applies one
lora_alpha / r, llama.cpp's converter reads only the global lora_alpha and stops at any tensor that is neither lora_A
nor lora_B. So the scale is folded into B, lora_alpha = r, and every layer has one rank, padded with zeros.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.errors import WeftError
from weft.io.base import Base
from weft.tensors import read_tensors
from weft.terms import LowRank, Magnitude, Term
from weft.terms.adapters import Adapter
from weft.terms.factors import exact_factors, sum_factors

__all__ = ["CONFIG", "TENSORS", "plain_state", "read", "why_not_peft", "write"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_SHIFTED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def why_not_peft(adapter: Adapter) -> str | None:
    """Why the adapter has no exact form in PEFT's LoRA files, as half a sentence; None where it has one."""
    if adapter.extras:
        return f"it trains parameters of the model itself too ({next(iter(adapter.extras))})"
    rescaled = {_magnitude(terms.values()) is not None for terms in adapter.terms.values()}
    if rescaled == {True}:
        return None
    for layer, terms in adapter.terms.items():
        # each for itself and not their sum, which cannot be taken of sharded and plain tensors
        if any(exact_factors(term) is None for term in terms.values()):
            kinds = ", ".join(dict.fromkeys(term.kind for term in terms.values()))
            return f"its delta on {layer} ({kinds}) is no product of two thin matrices"
    return None


def write(directory: Path, base: Base, terms: Mapping[str, list[Term]]) -> bool:
    """Write PEFT's two files.

    Args:
        terms: layer -> the adapter's terms, holding whole tensors.

    Returns:
        Whether these tensors are the adapter itself, bit for bit.
    """
    dora = all(_magnitude(found) is not None for found in terms.values())
    pairs = {layer: _factors(found) for layer, found in terms.items()}
    rank = max(A.shape[0] for _, A in pairs.values())
    state = {}
    for layer, (B, A) in pairs.items():
        state[f"{_PREFIX}{layer}.lora_A.weight"] = F.pad(A, (0, 0, 0, rank - A.shape[0])).contiguous()
        state[f"{_PREFIX}{layer}.lora_B.weight"] = F.pad(B, (0, rank - B.shape[1])).contiguous()
        magnitude = _magnitude(terms[layer])
        if magnitude is not None:
            state[f"{_PREFIX}{layer}.lora_magnitude_vector"] = magnitude.magnitude.detach().float().contiguous()
    save_file(state, directory / TENSORS, metadata={"format": "pt"})
    config = _config(base, list(terms), rank, dora, _dropout(terms))
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return all(_is_itself(found, rank) for found in terms.values())


def plain_state(path: Path, layers: Iterable[str]) -> dict[str, Tensor]:
    """PEFT's tensors under the names of our own format, for an adapter that `write` found to be itself."""
    state = read_tensors(path / TENSORS)
    parts = {"A": "lora_A.weight", "B": "lora_B.weight"}
    return {
        f"{layer}.main.{name}": state[f"{_PREFIX}{layer}.{part}"] for layer in layers for name, part in parts.items()
    }


def read(path: Path, name: str, parameters: Container[str] | None = None) -> tuple[Adapter, Base]:
    """The adapter of PEFT's files, with its values of parameters of the model (biases, modules_to_save), and its base.

    Args:
        parameters: the names of the model's parameters, of which alone there may be values; None for any.

    Raises:
        WeftError: another kind of adapter, one that belongs to a base which PEFT changes on loading, or tensors that
        are missing or unexpected.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        state = read_tensors(path / TENSORS)
    except Exception as error:  # safetensors, json and the system each have their own
        raise WeftError(f"The adapter in {path} is damaged or incomplete ({error}); fetch it again.") from error
    _check_config(config, path)
    parts, extras = _parts(state, parameters, path)
    adapter = Adapter(name, "dora" if config.get("use_dora") else "lora", {}, {"rank": config["r"], "peft": True})
    for layer, found in parts.items():
        adapter.terms[layer] = {name: _term(layer, found, config, path)}
    adapter.extras = extras
    return adapter, _base(config)


def _factors(terms: list[Term]) -> tuple[Tensor, Tensor]:
    magnitude = _magnitude(terms)
    pair = sum_factors([magnitude.update] if magnitude is not None else terms)
    assert pair is not None
    return pair


def _magnitude(terms: Iterable[Term]) -> Magnitude | None:
    """The DoRA term, where it is the only one."""
    found = list(terms)
    return found[0] if len(found) == 1 and isinstance(found[0], Magnitude) else None


def _is_itself(terms: list[Term], rank: int) -> bool:
    (term, *more) = terms
    return (
        not more and isinstance(term, LowRank) and (term.scale, term.rank, term.A.dtype) == (1.0, rank, torch.float32)
    )


def _dropout(terms: Mapping[str, list[Term]]) -> float:
    return max((term.dropout for found in terms.values() for term in found if isinstance(term, LowRank)), default=0.0)


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
        "modules_to_save": None,
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


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise WeftError(
            f"{path} is a PEFT adapter of type {config.get('peft_type')}; weft reads LORA ones (LoRA, rsLoRA, DoRA, "
            "EVA)."
        )
    start = str(config.get("init_lora_weights"))
    if start.startswith(_SHIFTED_STARTS):
        raise WeftError(
            f"{path} was started by {start!r} and belongs to a base that PEFT changes when it loads it; convert it to "
            "a plain LoRA in PEFT first (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if config.get("target_parameters"):
        raise WeftError(
            f"{path} adapts parameters that are no linear layers ({config['target_parameters'][0]}), which weft cannot."
        )


def _parts(
    state: Mapping[str, Tensor], parameters: Container[str] | None, path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """layer -> {"lora_A.weight", "lora_B.weight", ...}, and tensors of the model itself."""
    parts: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in state.items():
        bare = key.removeprefix(_PREFIX)
        match = _KEY.fullmatch(bare)
        own = bare.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if match:
            parts.setdefault(match["layer"], {})[match["part"]] = tensor
        elif parameters is None or own in parameters:
            extras[own] = tensor
        else:
            raise WeftError(f"{path} holds the tensor {key}, which weft has no place for; nothing was loaded.")
    return parts, extras


def _term(layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> Term:
    wanted = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if parts.keys() != wanted:
        odd = min(parts.keys() ^ wanted)
        raise WeftError(
            f"{path}: the tensor {layer}.{odd} is {'missing' if odd in wanted else 'unexpected'}; fetch the adapter "
            "again, whole."
        )
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    rank = _by_pattern(config.get("rank_pattern"), layer, config["r"])
    if A.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise WeftError(
            f"{path}: {layer} has factors {tuple(B.shape)} and {tuple(A.shape)}, and the config says rank {rank}; "
            "fetch it again."
        )
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
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
