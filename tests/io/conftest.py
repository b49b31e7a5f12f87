"""A tiny Llama whose layers are sums of every kind of term."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

from weft.io import hook
from weft.io.quantizer import mark
from weft.terms import Dense, LowRank, Sparse, Spectral, SumLinear
from weft.terms.layers import linear_layers, replace, weight_of

hook.install()
logging.set_verbosity_error()
logging.disable_progress_bar()


def make_dense(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


def put_sums(model: LlamaForCausalLM, rank: int = 3) -> LlamaForCausalLM:
    """Every attention layer: low-rank + sparse; every other: dense + spectral."""
    generator = torch.Generator().manual_seed(7)
    for name, layer in linear_layers(model).items():
        W = weight_of(layer)
        draw = lambda *shape: 0.1 * torch.randn(*shape, generator=generator)  # noqa: E731
        if "self_attn" in name:
            mask = torch.rand(W.shape, generator=generator) < 0.2
            terms = {
                "low_rank": LowRank.from_factors(draw(W.shape[0], rank), draw(rank, W.shape[1]), scale=0.5),
                "sparse": Sparse.from_mask(W, mask),
            }
        else:
            terms = {
                "base": Dense.from_matrix(W),
                "spectral": Spectral.from_factors(draw(W.shape[0], rank), draw(rank), draw(rank, W.shape[1])),
            }
        replace(model, name, SumLinear(terms, layer.bias))
    return model


@pytest.fixture
def dense() -> LlamaForCausalLM:
    return make_dense()


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Not marked."""
    return put_sums(make_dense())


@pytest.fixture
def saved(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    mark(model, method="by-hand", budget=0.5)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.arange(1, 17).view(2, 8)


@pytest.fixture(scope="session")
def same_tensors() -> Callable[[torch.nn.Module, torch.nn.Module], None]:
    def check(a: torch.nn.Module, b: torch.nn.Module) -> None:
        left, right = a.state_dict(), b.state_dict()
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name

    return check
