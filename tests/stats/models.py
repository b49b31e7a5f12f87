"""Tiny random models of every kind that statistics must get right, and slow references to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from weft.terms.layers import is_conv1d, linear_layers

hf.logging.set_verbosity_error()

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 4}
SLIDING = {**GROUPED, "sliding_window": 4}
T5 = {**TOKENS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
OPT = {**TOKENS, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 64}
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}

BUILD: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SLIDING)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SLIDING, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, num_hidden_layers=2, num_attention_heads=4)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**COMMON)),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**COMMON, embedding_size=8)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, image_size=16, patch_size=8)),
}
ENCODER_DECODER = ("t5", "bart")


def build(name: str) -> nn.Module:
    """In eval mode, with weights large enough that every layer matters."""
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight.copy_(torch.randn_like(layer.weight) / 4)
            if layer.bias is not None:
                layer.bias.copy_(torch.randn_like(layer.bias) / 4)
    return model


def ids(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def batches(name: str) -> list[dict[str, Tensor]]:
    """Two batches of different sizes, padded on the left and on the right, labels partly -100."""
    if name == "vit":
        pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([0, 1, 1, 0, 1])
        return [
            {"pixel_values": pixels[:2], "labels": labels[:2]},
            {"pixel_values": pixels[2:], "labels": labels[2:]},
        ]
    made = []
    for rows, columns, kept in ((2, 9, [slice(0, 6), slice(0, 9)]), (3, 7, [slice(2, 7), slice(0, 7), slice(1, 7)])):
        mask = torch.zeros(rows, columns, dtype=torch.long)
        for row, part in enumerate(kept):
            mask[row, part] = 1
        tokens = ids(rows, columns, seed=rows)
        labels = tokens.masked_fill(mask == 0, -100)
        if name in ENCODER_DECODER:  # as long as the input, and padded elsewhere
            labels = ids(rows, columns, seed=rows + 1)
            labels[0, 3:], labels[1, 5:] = -100, -100
        made.append({"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels})
    return made


def decoder_mask(batch: Mapping[str, Tensor]) -> Tensor:
    kept = torch.ones_like(batch["labels"], dtype=torch.bool)
    kept[:, 1:] = batch["labels"][:, :-1] != -100
    return kept


def expected_mask(name: str, layer: str, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of a layer's input, by its name."""
    if "attention_mask" not in batch:
        return None
    mask = batch["attention_mask"].bool()
    crossed = any(
        part in layer for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k", "encoder_attn.v")
    )
    return decoder_mask(batch) if name in ENCODER_DECODER and "decoder." in layer and not crossed else mask


def inputs_and_outputs(
    model: nn.Module, batch: Mapping[str, Any], layers: Sequence[str]
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], Any]:
    """layer -> (input, output) of every use, in one plain forward pass; and what the model returned."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda m, args, out, layer=layer: seen[layer].append((args[0], out))
        )
        for layer in layers
    ]
    returned = model(**batch)
    for handle in handles:
        handle.remove()
    return seen, returned


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count (tokens, features), in fp64."""
    if mask is None or x.shape[:-1].numel() != mask.numel():
        return x.detach().reshape(-1, x.shape[-1]).double()
    rows = x.detach().reshape(*mask.shape, -1)
    return torch.stack([rows[b, t].double() for b, t in mask.nonzero().tolist()])


def predictions(model: nn.Module, labels: Tensor) -> int:
    return int(
        (
            (labels[:, 1:] if "LM" in type(model).__name__ and "Masked" not in type(model).__name__ else labels) != -100
        ).sum()
    )


def reference(name: str, model: nn.Module, data: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Every statistic of the table, from raw inputs, outputs and gradients, and sequence by sequence."""
    layers = list(linear_layers(model))
    sums: dict[str, dict[str, Any]] = {layer: {} for layer in layers}
    tokens = dict.fromkeys(layers, 0)
    sequences = 0

    def add(layer: str, need: str, value: Tensor) -> None:
        sums[layer][need] = sums[layer].get(need, 0) + value

    for batch in data:
        seen, returned = inputs_and_outputs(model, batch, layers)
        labels = batch["labels"]
        total = returned.loss * predictions(model, labels)
        weights = [model.get_submodule(layer).weight for layer in layers]
        outputs = [y for layer in layers for _, y in seen[layer]]
        gradients = list(torch.autograd.grad(total, weights + outputs))
        for layer in layers:
            gradient = gradients.pop(0)
            add(layer, "mean_grad", (gradient.mT if is_conv1d(model.get_submodule(layer)) else gradient).double())
        for layer in layers:
            mask = expected_mask(name, layer, batch)
            for x, y in seen[layer]:
                g = gradients.pop(0)
                a, b, c = (kept(t, mask) for t in (x, y, g))
                tokens[layer] += len(a)
                add(layer, "input_moment", torch.einsum("ti,tj->ij", a, a))
                add(layer, "input_mean", a.sum(0))
                add(layer, "input_abs_mean", a.abs().sum(0))
                add(layer, "output_mean", b.sum(0))
                add(layer, "output_moment", torch.einsum("ti,tj->ij", b, b))
                add(layer, "output_grad_moment", torch.einsum("ti,tj->ij", c, c))
        for i in range(len(labels)):  # one sequence alone, its whole gradient from autograd
            sequences += 1
            one = {key: value[i : i + 1] for key, value in batch.items()}
            loss = model(**one).loss * predictions(model, one["labels"])
            for layer, gradient in zip(layers, torch.autograd.grad(loss, weights), strict=True):
                squared = (gradient.mT if is_conv1d(model.get_submodule(layer)) else gradient) ** 2
                add(layer, "fisher_rows", squared.double().sum(1))
                add(layer, "fisher_columns", squared.double().sum(0))
    return {
        layer: {
            need: value / (sequences if need.startswith("fisher") else tokens[layer]) for need, value in by_need.items()
        }
        for layer, by_need in sums.items()
    }
