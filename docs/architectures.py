"""docs/architectures.md: what weft covers of the architectures that people run, and what it leaves and why, counted on
tiny models of each. `tests/test_coverage.py` puts adapters on the same models.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf

from weft.terms.coverage import coverage
from weft.terms.experts import open_experts
from weft.terms.layers import eligible

HERE = Path(__file__).parent
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADED = {**TEXT, "head_dim": 8}
PLAIN = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class Case(NamedTuple):
    """A tiny model: its class and the arguments of its config; `layers` names what can be covered where not all can."""

    model: str
    config: str
    arguments: dict[str, Any]
    layers: str | None = None


CASES = {
    "Llama": Case("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", HEADED),
    "Qwen3-MoE": Case("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**HEADED, **MIXED}),
    "Mixtral": Case("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4}),
    "Gemma 3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", HEADED),
    "Gemma 3 vision-language": Case(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {**HEADED, "sliding_window": 8}, "vision_config": {**TOWER, "image_size": 16, "patch_size": 8}}
        | {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62},
    ),
    "Phi-4": Case("Phi3ForCausalLM", "Phi3Config", TEXT),
    "Llama 4": Case(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**HEADED, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 8},
    ),
    "DBRX": Case(
        "DbrxForCausalLM",
        "DbrxConfig",
        {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "pad_token_id": 0}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}
        | {"ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "GPT-OSS": Case("GptOssForCausalLM", "GptOssConfig", {**HEADED, "num_local_experts": 4}),
    "DeepSeek-V3": Case(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**TEXT, **LATENT, **GROUPED, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    ),
    "Falcon": Case("FalconForCausalLM", "FalconConfig", {k: v for k, v in PLAIN.items() if k != "intermediate_size"}),
    "Mamba": Case(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "Falcon-H1": Case(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**HEADED, **MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    ),
    "Granite hybrid": Case(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**TEXT, **MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]}
        | {"shared_intermediate_size": 48, "num_local_experts": 0},
    ),
    "ModernBERT": Case("ModernBertForMaskedLM", "ModernBertConfig", PLAIN),
    "T5Gemma": Case("T5GemmaForConditionalGeneration", "T5GemmaConfig", {"encoder": HEADED, "decoder": HEADED}),
    "Whisper": Case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"max_source_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 1},
    ),
    "CLIP": Case(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TOWER, "vocab_size": 64}, "vision_config": {**TOWER, "image_size": 16, "patch_size": 8}},
    ),
}


def build(case: Case) -> hf.PreTrainedModel:
    """The tiny model, on the default device."""
    config = getattr(hf, case.config)(**case.arguments)
    model: hf.PreTrainedModel = getattr(hf, case.model)(config)
    model.train(False)
    return model


def architectures_page() -> str:
    """A row for each architecture; where this transformers lacks one, as the page has it."""
    lines = [
        "# Architectures",
        "",
        "Generated by `python docs/generate.py` on a tiny model of each class: the share of the numbers in its "
        "matrices, embeddings and heads aside, that lie in linear layers which weft can replace, and what it leaves. "
        "Where that is less than half, verbs ask for the layers by name (`layers=`, or `targets=` for adapters). "
        "Every verb warns of what it leaves, where that is more than a hundredth. The experts of a mixture, which "
        "transformers holds in one tensor a matrix, are linear layers to every verb (`experts.3.gate_up`, "
        "`experts.3.down`, one for each expert): each is calibrated by the tokens that are routed to it, compressed, "
        "quantised and adapted by itself, and `weft merge` writes the tensors of transformers again. An expert that no "
        "calibration token reaches stays as it is, and a warning names it.",
        "",
        "| architecture | class | covered | left as it is |",
        "|---|---|---|---|",
    ]
    path = HERE / "architectures.md"
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for name, case in CASES.items():
        written = [line for line in known if line.startswith(f"| {name} |")]
        lines += [_row(name, case)] if getattr(hf, case.model, None) is not None else written
    return "\n".join(lines) + "\n"


def _row(name: str, case: Case) -> str:
    with torch.device("meta"):
        model = build(case)
    open_experts(model)
    found = coverage(model, eligible(model))
    reasons = Counter((key.rpartition(".")[2], reason) for key, reason in found.left.items())
    left = "; ".join(f"`{part}`: {reason}" for part, reason in reasons) or "nothing"
    return f"| {name} | `{case.model}` | {100 * found.share:.0f} % | {left} |"
