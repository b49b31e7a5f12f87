"""The fields of PEFT's adapter_config.json: which of them weft honours, which cannot change what an adapter
computes, and which it refuses by name. A field that is in none of the three is refused where it is set, for it may mean
anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.errors import WeftError

__all__ = ["CONFIG", "HARMLESS", "HONOURED", "REFUSED", "check", "read_config"]

CONFIG = "adapter_config.json"

HONOURED = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "init_lora_weights",
    # what each layer's update is
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    # which layers: the tensors say so
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # parameters of the model itself
    "bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
})  # fmt: skip

HARMLESS = {
    "auto_mapping": "names the class of the base",
    "peft_version": "names who wrote it",
    "revision": "names the base's version",
    "inference_mode": "says whether PEFT freezes it on loading",
    "runtime_config": "is not saved",
    "eva_config": "says how the start was found",
    "corda_config": "says how the start was found",
    "lora_ga_config": "says how the start was found",
    "loftq_config": "says how the start was found",
    "megatron_core": "names a package, used with megatron_config",
    "qalora_group_size": "is used with use_qalora",
    "velora_config": "changes what training keeps for the backward pass, not the layer",
}
"""Field -> what it does instead of changing the layer's function."""

REFUSED = {
    "alora_invocation_tokens": "the adapter works from its invocation tokens on and not before (aLoRA)",
    "arrow_config": "each token is routed to adapters of its own (Arrow)",
    "kasa_config": "the base loses its smallest singular components (KaSA)",
    "layer_replication": "the model's blocks are repeated",
    "lora_bias": "the update has a bias of its own",
    "megatron_config": "the layers are Megatron's parallel ones",
    "monteclora_config": "the update is drawn anew in each step (MonteCLoRA)",
    "target_parameters": "it adapts parameters that are no linear layers",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
    "use_qalora": "the update sees pooled inputs (QA-LoRA)",
}
"""Field -> what the adapter then is, which weft cannot compute."""

_SHIFTED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PLAIN_STARTS = ("True", "False", "None", "gaussian", "eva", "orthogonal", "mica")


def read_config(path: Path) -> dict[str, Any]:
    """The adapter_config.json in the directory, checked.

    Raises:
        WeftError: it is damaged, or says of the adapter what weft cannot honour.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is no mapping")
    except (OSError, ValueError) as error:
        raise WeftError(f"The adapter in {path} is damaged or incomplete ({error}); fetch it again.") from error
    check(config, path)
    return config


def check(config: Mapping[str, Any], path: Path) -> None:
    """Raises WeftError, naming the field, for a configuration that weft cannot honour."""
    if config.get("peft_type") != "LORA":
        raise WeftError(
            f"{path} is a PEFT adapter of type {config.get('peft_type')}; weft reads LORA ones (LoRA, rsLoRA, DoRA, "
            "EVA)."
        )
    for field, value in config.items():
        if field in HONOURED or field in HARMLESS or not value:
            continue
        what = REFUSED.get(field, "which this weft does not know")
        raise WeftError(
            f"{path} cannot be read as a LoRA: its {CONFIG} sets {field} = {json.dumps(value)[:80]}, {what}; use it in "
            "PEFT."
        )
    start = str(config.get("init_lora_weights", True))
    if start.startswith(_SHIFTED_STARTS):
        raise WeftError(
            f"{path} was started by {start!r} and belongs to a base that PEFT changes when it loads it; convert it to "
            "a plain LoRA in PEFT first (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if start not in _PLAIN_STARTS:
        raise WeftError(f"{path} was started by {start!r}, which this weft does not know; use it in PEFT.")
