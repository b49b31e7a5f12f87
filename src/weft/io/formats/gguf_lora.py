"""A LoRA as llama.cpp adds it to a model when it runs: one GGUF file of the factors.

    W x + B (A x):   lora_a = A (r, in),   lora_b = s B (out, r),   fp32

under the names that GGUF gives the layers' weights; s is written into B, so that the field alpha is 0, which llama.cpp
reads as a scale of 1, and ranks may differ by layer. Several low-rank terms of a layer become one of their ranks' sum.
Rows of B are reordered for queries and keys as those of the weight are.

Source: the package gguf 0.19; llama.cpp's convert_lora_to_gguf.py for the names of fields.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weft.errors import WeftError
from weft.io.formats import gguf as whole
from weft.io.formats.base import Format
from weft.terms import Term

__all__ = ["FORMAT", "factors_of", "write_factors"]

FILE = "adapter.gguf"


def factors_of(layer: str, terms: Mapping[str, Term]) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of the sum of low-rank terms, fp32. Raises WeftError for a term of another kind."""
    found = {key: term.lora() for key, term in terms.items()}
    for key, lora in found.items():
        if lora is None or lora.magnitude is not None:
            raise WeftError(f"{layer} has a term of kind {terms[key].kind}, which no LoRA of llama.cpp holds.")
    pairs = [(lora.B, lora.A) for lora in found.values() if lora is not None]
    return torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs])


def write_factors(model: PreTrainedModel, terms: Mapping[str, Mapping[str, Term]], directory: Path) -> None:
    """Write the low-rank terms of each layer into `directory` / adapter.gguf."""
    import gguf

    config = model.config
    architecture = whole.ARCHITECTURES[type(model).__name__]
    names = whole.tensor_names(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(directory / FILE, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for layer, own in terms.items():
        B, A = factors_of(layer, own)
        name = names(f"{layer}.weight")
        rows = whole.as_rotated(architecture, config, f"{layer}.weight", B.cpu().numpy())
        writer.add_tensor(f"{name}.lora_a", A.cpu().contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", rows.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FORMAT = Format(
    name="gguf-lora",
    summary="The low-rank adapters of a model, or its factors beside codes, alone: llama.cpp adds them to its base.",
    holds="low-rank adapters, or factors beside codes, of Llama, Mistral, Qwen2 and Qwen3; not the model",
    reads="llama.cpp and what is built on it, beside the base as GGUF",
    library="gguf",
    usage=f"```bash\nllama-cli -m base.gguf --lora {FILE}\n```",
    package="gguf",
    dtypes=(torch.float32,),
    check=whole.FORMAT.check,
    adapter=write_factors,
)
