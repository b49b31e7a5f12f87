"""compressed-tensors: integer codes of 1 to 8 bits and floating-point codes of 4, 6 and 8, layer by layer.

    pack-quantized: integers
        weight_packed       (out, ceil(in bits / 32)) int32, codes from 0 on along the input
        weight_scale        (out, groups), in the model's dtype
        weight_zero_point   (ceil(out bits / 32), groups) int32, along the output; absent where it is the middle
        weight_shape        [out, in]
    float-quantized: e4m3 with a scale a row
        weight              (out, in) float8_e4m3fn
        weight_scale        (out, 1), in the model's dtype
    mxfp8-quantized, mxfp6-pack-quantized, mxfp4-pack-quantized: 32 inputs to a shared exponent
        weight              as above, for 8 bits
        weight_packed       (out, in bits / 8) uint8, the first code in the lowest bits, for 6 and 4
        weight_scale        (out, in / 32) uint8, the exponent + 127

Source: the package compressed-tensors 0.20. vLLM's kernels take integer codes of 4 and 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.io.formats.base import Coded, Export, Format, nearest, rounds
from weft.io.formats.packing import pack
from weft.terms.base import FloatCodes, IntegerCodes

__all__ = ["FORMAT"]

_BIAS = 127  # of a shared exponent
_SHARED = {"e2m1": (4, "mxfp4-pack-quantized"), "e2m3": (6, "mxfp6-pack-quantized"), "e4m3": (8, "mxfp8-quantized")}
_GROUP = 32  # of a shared exponent


def _unfit(codes: IntegerCodes | FloatCodes, dtype: torch.dtype) -> str | None:
    inn = codes.codes.shape[1]
    if isinstance(codes, FloatCodes):
        known = codes.element in _SHARED and codes.group == _GROUP if codes.shared else codes.element == "e4m3"
        if not known or (not codes.shared and codes.group != inn):
            form = "a shared exponent" if codes.shared else "a scale"
            return f"there is no layout for {codes.element} with {form} for {codes.group} inputs"
    if inn % codes.group:
        return f"its {inn} inputs are no whole number of groups of {codes.group}{nearest(inn, codes.group)}"
    if isinstance(codes, FloatCodes) and codes.shared:
        return None if dtype == torch.bfloat16 else "shared exponents are for models of bf16 alone (--dtype bfloat16)"
    return rounds(codes.scales, dtype)


def _tensors(layers: Mapping[str, Coded], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    makers = {name: _floats if isinstance(layer.codes, FloatCodes) else _packed for name, layer in layers.items()}
    return {name: makers[name](layer.codes, dtype) for name, layer in layers.items()}


def _floats(codes: FloatCodes, dtype: torch.dtype) -> dict[str, Tensor]:
    scales = codes.scales.to(dtype)
    if codes.shared:
        scales = (torch.frexp(codes.scales).exponent - 1 + _BIAS).to(torch.uint8)
    if codes.element == "e4m3":
        return {"weight": codes.codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    bits, _ = _SHARED[codes.element]
    packed = pack(codes.codes, bits).view(torch.uint8)[:, : codes.codes.shape[1] * bits // 8]
    return {"weight_packed": packed.contiguous(), "weight_scale": scales}


def _packed(codes: IntegerCodes, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {
        "weight_packed": pack(codes.codes, codes.bits),
        "weight_scale": codes.scales.to(dtype),
        "weight_shape": torch.tensor(codes.codes.shape),
    }
    if not codes.symmetric:
        found["weight_zero_point"] = pack(codes.zeros.T, codes.bits).T.contiguous()
    return found


def _scheme(codes: IntegerCodes | FloatCodes) -> dict[str, Any]:
    """What a layer is in, by the library's own words."""
    shared, layout = False, "pack-quantized"
    if isinstance(codes, FloatCodes):
        shared = codes.shared
        bits, layout = _SHARED[codes.element] if shared else (8, "float-quantized")
        kind: dict[str, Any] = {"num_bits": bits, "type": "float", "symmetric": True}
    else:
        kind = {"num_bits": codes.bits, "type": "int", "symmetric": codes.symmetric}
    whole = codes.group == codes.codes.shape[1] and not shared
    weights = {"strategy": "channel", "group_size": None} if whole else {"strategy": "group", "group_size": codes.group}
    weights |= {**kind, "dynamic": False, **({"scale_dtype": "torch.uint8"} if shared else {})}
    return {"weights": weights, "input_activations": None, "output_activations": None, "format": layout}


def _config(export: Export) -> dict[str, Any]:
    schemes: list[tuple[dict[str, Any], list[str]]] = []
    for name, layer in export.layers.items():
        scheme = _scheme(layer.codes)
        names = next((names for other, names in schemes if scheme == other), None)
        if names is None:
            schemes.append((scheme, [name]))
        else:
            names.append(name)
    alone = len(schemes) == 1
    layouts = {scheme["format"] for scheme, _ in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if alone else names, **scheme}
            for i, (scheme, names) in enumerate(schemes)
        },
        "ignore": export.linear_names() if alone else [],
        "kv_cache_scheme": None,
    }


def _caution(layers: Mapping[str, Coded]) -> str | None:
    """With compressed-tensors 0.20, transformers 5.23 finds packed zero points of another shape than it expects, and
    decodes all layers by the scheme of the first where it decodes when it opens.
    """
    integers = [layer.codes for layer in layers.values() if isinstance(layer.codes, IntegerCodes)]
    if all(codes.symmetric for codes in integers):
        return None
    if any(_scheme(layer.codes) != _scheme(integers[0]) for layer in layers.values()):
        return (
            "vLLM reads these layers of several widths or grids with zero points; transformers refuses them, and with "
            "dequantize=True takes all for the first one's: give it symmetric codes, or one width."
        )
    return "transformers opens zero points with quantization_config=CompressedTensorsConfig(dequantize=True)."


_WITH_ADAPTER = """Low-rank factors stand beside its codes: the model is this with the adapter in `peft/`, which servers
add as well. PEFT 0.21 adds it to decoded layers alone.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

decoded = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained("path-of-this-directory", quantization_config=decoded)
PeftModel.from_pretrained(model, "path-of-this-directory/peft")
```"""

FORMAT = Format(
    name="compressed-tensors",
    summary="Packed codes of vLLM's own library.",
    holds="integer codes of 2 to 8 bits with a scale a group or a row, symmetric or not; fp8 with a scale a row; "
    "mxfp4, mxfp6 and mxfp8; layers may differ",
    reads="transformers with the package compressed-tensors; vLLM and SGLang (integers of 4 and 8 bits, and floats "
    "where the device has them)",
    with_adapter=_WITH_ADAPTER,
    caution=_caution,
    floats=True,
    unfit=_unfit,
    tensors=_tensors,
    config=_config,
    codes_only=True,
)
