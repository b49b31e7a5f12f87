"""Sizes against the published parameter counts, and models drawn from a seed."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weft.errors import WeftError
from weft.terms import LowRank
from weft.train.sizes import SIZES, configuration, fresh_model
from weft.verbs.fresh import restructure

PUBLISHED = {"60m": 58_073_600}  # of the models that the tables were made with


class Vocabulary:
    """What a configuration reads of a tokenizer: the published tables' 32,000 tokens."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self):
        return 32_000


def tiny():
    return LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_published_ones(size):
    with torch.device("meta"):
        model = LlamaForCausalLM(configuration(size, Vocabulary(), 256))
    count = sum(p.numel() for p in model.parameters())
    d, f, layers, _ = SIZES[size]
    assert count == 2 * 32_000 * d + layers * (4 * d * d + 3 * d * f + 2 * d) + d
    assert count == PUBLISHED.get(size, count)
    millions = float(size.rstrip("mb")) * (1000 if size.endswith("b") else 1)
    assert abs(count / 1e6 / millions - 1) < 0.35, "the name says roughly how many"


def test_a_base_is_narrower_in_everything_but_depth_and_head_size():
    wide, base = (configuration("130m", Vocabulary(), 256, width=w) for w in (None, 192))
    assert (base.hidden_size, base.intermediate_size, base.num_attention_heads) == (192, 512, 3)
    assert base.num_hidden_layers == wide.num_hidden_layers and base.head_dim == wide.head_dim
    for width in (100, 32, 1536):
        with pytest.raises(WeftError, match=f"A base width of {width} does not fit 130m: give a multiple of 64"):
            configuration("130m", Vocabulary(), 256, width=width)


def test_an_unknown_size_is_a_sentence():
    with pytest.raises(WeftError, match="no model size called '60b'; the nearest are: 60m"):
        configuration("60b", Vocabulary(), 256)


def test_a_window_longer_than_the_usual_context_widens_it():
    assert configuration("9m", Vocabulary(), 4096).max_position_embeddings == 4096


def test_weights_come_from_the_seed_and_nothing_else_is_drawn():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (fresh_model(tiny(), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a[name], c[name])
    assert abs(float(a[name].std()) / 0.02 - 1) < 0.1


@pytest.mark.parametrize("rank", [4, 32])
def test_products_of_factors_are_as_large_as_the_matrices(rank):
    model = restructure(fresh_model(tiny(), 0), "low-rank", rank, 0)
    terms = [m for m in model.modules() if isinstance(m, LowRank)]
    assert len(terms) == 14 and all(t.A.shape[0] == t.B.shape[1] == rank for t in terms)
    products = torch.cat([t.dense().detach().flatten() for t in terms])
    assert abs(float(products.std()) / 0.02 - 1) < 0.05
    again = restructure(fresh_model(tiny(), 0), "low-rank", rank, 0)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_factors_fit_their_matrices():
    for rank in (0, 65):
        with pytest.raises(WeftError, match=rf"Rank {rank} is not possible for low-rank: .*q_proj is 64 x 64; give 1"):
            restructure(fresh_model(tiny(), 0), "low-rank", rank, 0)
