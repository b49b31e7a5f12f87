"""Tiny models of every family, adapters put on by hand, and one training step of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from weft.terms import Dense, LowRank, SumLinear
from weft.terms.layers import bias_of, is_conv1d, linear_layers, replace, weight_of

FAMILIES = ["llama", "qwen3", "gemma", "gemma2", "gpt2", "opt", "mistral", "phi", "phi3", "cohere"]
_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_OWN = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.5},
}


def make_model(family="llama", **changes):
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {} if family == "gpt2" else _SHAPE
    config = AutoConfig.for_model(family, **{**tokens, "vocab_size": 61, **shape, **_OWN.get(family, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).train()


def put_on(model, rank=2):
    """A LowRank term with random factors beside the frozen weight of every linear layer."""
    generator = torch.Generator().manual_seed(1)
    layers = linear_layers(model)
    model.requires_grad_(False)
    for name, module in layers.items():
        W = weight_of(module).contiguous()
        B, A = (
            torch.randn(n, generator=generator).mul(0.1).to(W.dtype) for n in ((W.shape[0], rank), (rank, W.shape[1]))
        )
        terms = {"base": Dense.from_matrix(W), "default": LowRank.from_factors(B, A, scale=2.0)}
        layer = SumLinear(terms, bias_of(module), transposed=is_conv1d(module)).requires_grad_(False)
        layer.terms["default"].requires_grad_(True)
        replace(model, name, layer)
    return model


def make_batch(vocabulary=61, shape=(2, 12), ignored=5):
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def train_step(model, **inputs):
    """The output, and the gradient of every trained parameter by name."""
    model.zero_grad()
    output = model(**(make_batch() | inputs))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left, right, tolerance):
    assert left.keys() == right.keys() and left
    for name in left:
        torch.testing.assert_close(
            left[name],
            right[name],
            rtol=tolerance,
            atol=tolerance * left[name].abs().max().item(),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.fixture
def models():
    """This module's functions, as `models.make_model` and so on."""
    import sys

    return sys.modules[__name__]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
