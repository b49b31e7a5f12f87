"""GPTQ: integer codes of 2, 3, 4 or 8 bits, packed along the input, as AutoGPTQ laid them out and GPTQModel reads them.

    qweight   (in bits / 32, out) int32       qzeros   (groups, out bits / 32) int32
    scales    (groups, out) fp16              g_idx    (in,) int32, the group of each input

The first format stores a zero point less one, so that 0 has no place in it: codes whose zero points are not all in the
middle are written in "gptq_v2", which stores them as they are. Layers that differ from the model's first scheme, or
have no codes, are named under "dynamic".

Source: GPTQModel 7.7 (its TorchLinear and QuantizeConfig).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft import __version__
from weft.io.formats.base import Coded, Export, Format, nearest, rounds
from weft.io.formats.packing import pack
from weft.terms.base import IntegerCodes

__all__ = ["FORMAT"]

_BITS = (2, 3, 4, 8)


def _unfit(codes: IntegerCodes, dtype: torch.dtype) -> str | None:
    out, inn = codes.codes.shape
    if codes.bits not in _BITS:
        return f"its codes have {codes.bits} bits, and GPTQ's layout 2, 3, 4 or 8"
    if inn % 32 or out % 32:
        return f"{out} x {inn} is no multiple of 32 both ways, which GPTQ's kernels ask for"
    if inn % codes.group:
        return f"its {inn} inputs are no whole number of groups of {codes.group}{nearest(inn, codes.group)}"
    return rounds(codes.scales, dtype)


def _tensors(layers: Mapping[str, Coded], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    first = int(_symmetric(layers))
    return {name: _packed(layer.codes, dtype, first) for name, layer in layers.items()}


def _packed(codes: IntegerCodes, dtype: torch.dtype, less: int) -> dict[str, Tensor]:
    return {
        "qweight": pack(codes.codes, codes.bits).T.contiguous(),
        "qzeros": pack((codes.zeros - less).T, codes.bits),
        "scales": codes.scales.T.to(dtype).contiguous(),
        "g_idx": torch.arange(codes.codes.shape[1], dtype=torch.int32) // codes.group,
    }


def _symmetric(layers: Mapping[str, Coded]) -> bool:
    """Whether the first format holds them all."""
    return all(layer.codes.symmetric for layer in layers.values())


def _scheme(codes: IntegerCodes) -> dict[str, Any]:
    whole = codes.group == codes.codes.shape[1]
    return {"bits": codes.bits, "group_size": -1 if whole else codes.group, "sym": codes.symmetric}


def _config(export: Export) -> dict[str, Any]:
    schemes = {name: _scheme(layer.codes) for name, layer in export.layers.items()}
    first = max(schemes.values(), key=list(schemes.values()).count)
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in export.linear_names() if name != "lm_head"}
    dynamic |= {f"+:^{re.escape(name)}$": scheme for name, scheme in schemes.items() if scheme != first}
    return {
        "quant_method": "gptq",
        **first,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if _symmetric(export.layers) else "gptq_v2",
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"weft:{__version__}"]},
    }


FORMAT = Format(
    name="gptq",
    summary="GPTQ's packed integer codes.",
    holds="integer codes of 2, 3, 4 or 8 bits with 16-bit scales, sides that are multiples of 32; widths may differ by "
    "layer",
    reads="GPTQModel, transformers with it; vLLM and SGLang",
    dtypes=(torch.float16,),
    unfit=_unfit,
    tensors=_tensors,
    config=_config,
    codes_only=True,
    files=lambda config: {"quantize_config.json": config},
)
