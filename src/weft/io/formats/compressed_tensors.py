"""compressed-tensors, "pack-quantized": integer codes of 1 to 8 bits, packed along the input, with a scale a group or
a row.

    weight_packed       (out, ceil(in bits / 32)) int32, codes from 0 on
    weight_scale        (out, groups), in the model's dtype
    weight_zero_point   (ceil(out bits / 32), groups) int32, packed along the output; absent where it is the middle
    weight_shape        [out, in]

Source: the package compressed-tensors 0.20 (pack_quantized). vLLM's kernels take codes of 4 and 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.io.formats.base import Coded, Export, Format, rounds
from weft.io.formats.packing import pack
from weft.terms.base import IntegerCodes

__all__ = ["FORMAT"]

_LAYOUT = "pack-quantized"


def _unfit(codes: IntegerCodes, dtype: torch.dtype) -> str | None:
    inn = codes.codes.shape[1]
    if inn % codes.group:
        return f"its {inn} inputs are no whole number of groups of {codes.group}"
    return rounds(codes.scales, dtype)


def _tensors(layers: Mapping[str, Coded], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    return {name: _packed(layer.codes, dtype) for name, layer in layers.items()}


def _packed(codes: IntegerCodes, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {
        "weight_packed": pack(codes.codes, codes.bits),
        "weight_scale": codes.scales.to(dtype),
        "weight_shape": torch.tensor(codes.codes.shape),
    }
    if not codes.symmetric:
        found["weight_zero_point"] = pack(codes.zeros.T, codes.bits).T.contiguous()
    return found


def _weights(codes: IntegerCodes) -> dict[str, Any]:
    """The scheme of a layer, by the library's own words."""
    whole = codes.group == codes.codes.shape[1]
    return {
        "num_bits": codes.bits,
        "type": "int",
        "symmetric": codes.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else codes.group,
        "dynamic": False,
    }


def _config(export: Export) -> dict[str, Any]:
    schemes: list[tuple[dict[str, Any], list[str]]] = []
    for name, layer in export.layers.items():
        weights = _weights(layer.codes)
        names = next((names for scheme, names in schemes if scheme == weights), None)
        if names is None:
            schemes.append((weights, [name]))
        else:
            names.append(name)
    alone = len(schemes) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if alone else names,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": _LAYOUT,
        }
        for i, (weights, names) in enumerate(schemes)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _LAYOUT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": export.linear_names() if alone else [],
        "kv_cache_scheme": None,
    }


FORMAT = Format(
    name="compressed-tensors",
    summary="Packed integer codes of vLLM's own library.",
    holds="integer codes of 2 to 8 bits with a scale a group or a row, symmetric or not; widths may differ by layer",
    reads="transformers with the package compressed-tensors; vLLM and SGLang (4 and 8 bits)",
    unfit=_unfit,
    tensors=_tensors,
    config=_config,
    codes_only=True,
)
