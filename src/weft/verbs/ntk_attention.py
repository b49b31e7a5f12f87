"""NTK-Attention: train what an endless prefix would do to each attention head, d^2 + d numbers a head (2024, arXiv
2406.14036).

    add_prefix(model)                 # every attention layer gets Z (heads, d, d) and z (heads, d); the rest is frozen
    ... train ...; save_prefix(model, "prefix/"); load_prefix(model, "prefix/"); remove_prefix(model)

The formula is in `weft.kernels.prefix_attention`. One pair for each query head, on the queries as the attention sees
them (after rotary embedding); Z and z are constants, so decoding with a key-value cache is exact. It cannot be merged
into weights and no other library reads it. The attention is the plain one, which builds its L x T matrix.
Deviations: none in the function; the start is the published normal / 10^4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from weft.errors import WeftError
from weft.io.checkpoint import Checkpoint
from weft.kernels.prefix_attention import prefix_attention
from weft.runs.output import open_output
from weft.seeds import check_seed, generator

__all__ = ["Prefix", "add_prefix", "load_prefix", "remove_prefix", "save_prefix"]

_NAME = "weft_ntk"
_CONFIG = "weft_prefix.json"


class Prefix(nn.Module):
    """The trainable pair of one attention layer, in fp32."""

    def __init__(self, heads: int, size: int, device: Any = None) -> None:
        super().__init__()
        self.Z = nn.Parameter(torch.zeros(heads, size, size, device=device))
        self.z = nn.Parameter(torch.zeros(heads, size, device=device))


def add_prefix(model: PreTrainedModel, *, std: float = 1e-4, seed: int = 0) -> PreTrainedModel:
    """Give every attention layer its pair and freeze everything else; the same model is returned.

    Args:
        std: of the normal start, so that the function is near the model's own; 0 starts on it.
        seed: a layer's draw depends on it and on the layer's name alone.

    Raises:
        WeftError: there is a prefix already, or the model's attention cannot be exchanged.
    """
    if _prefixes(model):
        raise WeftError("There is a prefix on this model already; remove it first (remove_prefix).")
    check_seed(seed)
    layers = dict(_attention_layers(model))
    if not layers or not model._can_set_attn_implementation():
        raise WeftError(f"The attention of {type(model).__name__} cannot be exchanged, so it can have no prefix.")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = model.config._attn_implementation
    model.requires_grad_(False)
    for name, layer in layers.items():
        weight = next(layer.parameters())
        heads = layer.q_proj.out_features // layer.head_dim  # type: ignore[union-attr, operator]
        prefix = Prefix(heads, layer.head_dim, weight.device)  # type: ignore[arg-type]
        draw = generator(seed, "ntk-attention", name)
        with torch.no_grad():
            for parameter in prefix.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=draw))
        layer.weft_prefix = prefix
    model.set_attn_implementation(_NAME)
    model._weft_prefix = (before, trained)  # type: ignore[assignment]
    return model


def remove_prefix(model: PreTrainedModel) -> PreTrainedModel:
    """Take the prefix off; the model is what it was. Raises WeftError where there is none."""
    _need(model)
    before, trained = model.__dict__.pop("_weft_prefix")
    for _, layer in _attention_layers(model):
        del layer.weft_prefix
    model.set_attn_implementation(before)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(trained))
    return model


def save_prefix(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Write weft_prefix.safetensors (<layer>.Z, <layer>.z) and weft_prefix.json.

    Raises WeftError where there is no prefix, or the directory is not empty.
    """
    _need(model)
    state = {f"{n}.{k}": t.detach().cpu() for n, p in _prefixes(model).items() for k, t in p.named_parameters()}
    with open_output(directory, {}) as place:
        save_file(state, place.path / "weft_prefix.safetensors")
        said = {"format": 1, "base": model.config.name_or_path or None}
        (place.path / _CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def load_prefix(model: PreTrainedModel, directory: str | os.PathLike[str]) -> PreTrainedModel:
    """Put a saved prefix on the model; the same model is returned.

    Raises:
        WeftError: there is none in the directory, or it belongs to a model of other layers. The model is as it was.
    """
    if not (Path(directory) / _CONFIG).is_file():
        raise WeftError(f"{directory} holds no prefix: {_CONFIG} is not there.")
    state = Checkpoint(directory)
    add_prefix(model, std=0.0)
    own = {f"{n}.{k}": t for n, p in _prefixes(model).items() for k, t in p.named_parameters()}
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        remove_prefix(model)
        raise WeftError(f"The prefix in {directory} belongs to another model: {wrong[0]} does not fit this one.")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
    return model


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "head_dim", None), int) and isinstance(module._modules.get("q_proj"), nn.Module):
            yield name, module


def _prefixes(model: nn.Module) -> dict[str, Prefix]:
    found = {name: module._modules.get("weft_prefix") for name, module in _attention_layers(model)}
    return {name: prefix for name, prefix in found.items() if isinstance(prefix, Prefix)}


def _need(model: nn.Module) -> None:
    if not _prefixes(model):
        raise WeftError("There is no prefix on this model; put one on with add_prefix or load_prefix.")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (batch, heads, tokens, d) -> (batch, tokens, heads, d)."""
    prefix = module._modules.get("weft_prefix")
    if not isinstance(prefix, Prefix):  # another model of the same config object
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    out = prefix_attention(query, key, value, prefix.Z, prefix.z, mask, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, eager_mask)
