"""GGUF, llama.cpp's file: blocks of 32 codes with an fp16 scale where integer codes fit them exactly, fp16, bf16 or
fp32 elsewhere.

    Q4_0   d (q - 8),   q of 4 bits         4.5 bits a weight, for codes less their zero point from  -8 to 7
    Q5_0   d (q - 16),  q of 5 bits         5.5                                                     -16 to 15
    Q8_0   d q,         q of 8 bits, signed 8.5                                                    -128 to 127

A group is a multiple of 32 codes, its scale repeated for each block. A layer gets the smallest that holds its codes, so
that 2 and 3 bits take 4.5, and 4 bits with zero points 5.5. Rows of queries and keys are reordered as llama.cpp's
rotary embedding expects them. Low-rank terms beside codes are a second file, `adapter.gguf` (see gguf-lora).

Source: the package gguf 0.19; llama.cpp's convert_hf_to_gguf.py for the names of fields.
Deviations: one file, without rotary scaling, for the architectures and pre-tokenisers of the tables below. For others,
llama.cpp's converter takes what `--format hf` writes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.io.formats.base import Export, Format, rounds
from weft.terms import Term
from weft.terms.base import IntegerCodes

__all__ = ["ARCHITECTURES", "FORMAT", "as_rotated", "tensor_names"]

FILE = "model.gguf"
BLOCK = 32
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architecture of transformers -> of GGUF."""


class Grid(NamedTuple):
    """A type of block: the range of its signed codes."""

    name: str
    low: int
    high: int


GRIDS = (Grid("Q4_0", -8, 7), Grid("Q5_0", -16, 15), Grid("Q8_0", -128, 127))
"""By rising bytes."""
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}
"""How a byte-level tokenizer splits a text before it merges bytes -> llama.cpp's name for it."""


def _check(architecture: str, config: PreTrainedConfig) -> None:
    if architecture not in ARCHITECTURES:
        raise WeftError(
            f"{architecture} is none of the architectures that weft writes as GGUF ({', '.join(ARCHITECTURES)}); "
            "llama.cpp's converter takes what --format hf writes."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise WeftError(
            f"This model scales its rotary embedding ({rope}), which weft does not write as GGUF; llama.cpp's "
            "converter takes what --format hf writes."
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise WeftError(
            f"This {architecture} has biases that its kind mostly lacks, which weft does not write as GGUF; "
            "llama.cpp's converter takes what --format hf writes."
        )


def _grid(codes: IntegerCodes) -> Grid | None:
    low, high = (int(value) for value in torch.aminmax(codes.signed()))
    return next((grid for grid in GRIDS if grid.low <= low and high <= grid.high), None)


def _unfit(codes: IntegerCodes, dtype: torch.dtype) -> str | None:
    inn = codes.codes.shape[1]
    if inn % BLOCK or codes.group % BLOCK:
        return f"GGUF's blocks have {BLOCK} codes, and it has groups of {codes.group} along {inn} inputs"
    if _grid(codes) is None:
        return "its codes less their zero points do not fit 8 bits with a sign"
    return rounds(codes.scales, torch.float16)


def blocks(codes: IntegerCodes) -> tuple[str, np.ndarray]:
    """The type of block of a layer, and its bytes: (out, bytes a row) uint8."""
    grid = _grid(codes)
    assert grid is not None
    out, inn = codes.codes.shape
    q = codes.signed().view(out, inn // BLOCK, BLOCK).numpy()
    scales = codes.scales.repeat_interleave(codes.group // BLOCK, 1)[:, : inn // BLOCK]
    parts = [scales.half().numpy()[..., None].view(np.uint8)]
    if grid.name == "Q8_0":
        parts.append(q.astype(np.int8).view(np.uint8))
    else:
        unsigned = (q - grid.low).astype(np.uint8)
        if grid.name == "Q5_0":
            parts.append(np.packbits((unsigned >> 4).astype(np.uint8), axis=-1, bitorder="little"))
        low = unsigned & 15
        parts.append((low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4).astype(np.uint8))
    return grid.name, np.concatenate(parts, axis=-1).reshape(out, -1)


def _tensors(export: Export) -> Iterator[tuple[str, str, Any]]:
    """(name by transformers, GGUF's type, array) of every tensor."""
    tied = getattr(export.model.config, "tie_word_embeddings", False)
    for name, tensor in export.model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, *_plain(tensor)
    for name, layer in export.layers.items():
        yield f"{name}.weight", *blocks(layer.codes)


def _plain(tensor: Tensor) -> tuple[str, np.ndarray]:
    """A dense tensor; vectors are fp32, as llama.cpp has them."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dim() == 1 or tensor.dtype not in (torch.float16, torch.bfloat16):
        return "F32", tensor.float().numpy()
    if tensor.dtype == torch.float16:
        return "F16", tensor.numpy()
    return "BF16", tensor.view(torch.uint8).numpy()


def as_rotated(architecture: str, config: PreTrainedConfig, name: str, rows: np.ndarray) -> np.ndarray:
    """The rows; of a Llama's queries and keys, the halves of every head interleaved: llama.cpp rotates pairs."""
    if architecture != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return rows
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensor_names(architecture: str, blocks: int) -> Callable[[str], str]:
    """The name of transformers -> GGUF's, which raises WeftError where it has none."""
    import gguf

    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, blocks)

    def own(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise WeftError(f"GGUF has no name for the tensor {name} in a {architecture} model.")
        return str(found)

    return own


def _write(export: Export, directory: Path) -> None:
    import gguf

    config = export.model.config
    architecture = ARCHITECTURES[type(export.model).__name__]
    writer = gguf.GGUFWriter(directory / FILE, architecture)
    _write_sizes(writer, config)
    if export.tokenizer is not None:
        _write_vocabulary(writer, export.tokenizer, config.vocab_size)
    names = tensor_names(architecture, config.num_hidden_layers)
    for name, type_name, array in _tensors(export):
        array = as_rotated(architecture, config, name, array)
        writer.add_tensor(names(name), array, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: PreTrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(config.name_or_path or "model").name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)


def _write_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """The tokenizer; rows of the embedding without a token are unused ones."""
    import gguf

    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        special = gguf.SpecialVocab(place, load_merges=True)
    added = tokenizer.added_tokens_decoder
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    types = []
    for index in range(rows):
        token = added.get(index)
        plain = gguf.TokenType.NORMAL if index in words else gguf.TokenType.UNUSED
        types.append(
            plain if token is None else gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for the way this tokenizer splits a text.

    Raises:
        WeftError: it is no byte-level one that weft knows the name of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = {} if backend is None else json.loads(backend.to_str())
    before = said.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    plain = all(
        step.get("use_regex", True) and step.get("individual_digits", True) and not step.get("add_prefix_space")
        for step in steps
    )
    name = PRE_TOKENIZERS.get(tuple(step.get("type") for step in steps)) if plain else None
    if name is None or said["model"]["type"] != "BPE" or said["normalizer"] is not None:
        raise WeftError(
            "weft has no name in GGUF for the way this tokenizer splits a text; llama.cpp's converter takes what "
            "--format hf writes."
        )
    return name


def _write_factors(model: PreTrainedModel, terms: Mapping[str, Mapping[str, Term]], directory: Path) -> None:
    from weft.io.formats.gguf_lora import write_factors  # a page that itself stands on this one

    write_factors(model, terms, directory)


FORMAT = Format(
    name="gguf",
    summary="One file for llama.cpp and what is built on it.",
    holds="integer codes in groups of a multiple of 32 with fp16 scales, as Q4_0, Q5_0 or Q8_0, whichever holds them; "
    "everything else dense; of Llama, Mistral, Qwen2 and Qwen3",
    reads="llama.cpp and what is built on it; transformers by `gguf_file=`",
    library="gguf",
    usage="```bash\nllama-cli -m model.gguf\n```",
    with_adapter="Low-rank factors stand beside its codes: the model is the two files together.\n\n"
    "```bash\nllama-cli -m model.gguf --lora adapter.gguf\n```",
    package="gguf",
    check=_check,
    check_tokenizer=_pre_tokenizer,
    unfit=_unfit,
    write=_write,
    beside=_write_factors,
)
