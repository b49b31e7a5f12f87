"""The prefix on a model: near its function, trained alone, exact with a cache, and gone without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.errors import WeftError
from weft.testing_adapters import tiny_gpt2

IDS = torch.randint(32, (2, 10), generator=torch.Generator().manual_seed(0))


def tiny(blocks: int = 2) -> LlamaForCausalLM:
    """Four query heads on two key-value heads of 8."""
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    out: Tensor = model(**({"input_ids": IDS} | inputs)).logits
    return out


def add_prefix(model: nn.Module, **options: float) -> nn.Module:
    return weft.adapt(model, "ntk-attention", **options)


def moved(model: LlamaForCausalLM) -> LlamaForCausalLM:
    add_prefix(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return model


def test_the_start_is_near_the_model() -> None:
    before = logits(tiny())
    torch.testing.assert_close(logits(add_prefix(tiny(), std=0.0)), before, atol=1e-5, rtol=1e-5)
    difference = (logits(add_prefix(tiny())) - before).abs().max()
    assert 0 < difference < 1e-2


def test_what_is_trained() -> None:
    model = add_prefix(tiny())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 4 * (8 * 8 + 8)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_a_cache_gives_the_same() -> None:
    model = moved(tiny())
    whole, cache, parts = logits(model), None, []
    with torch.no_grad():
        for position in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_padding_is_hidden() -> None:
    model = moved(tiny())
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(13) >= 3).long().expand(2, 13)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, input_ids=padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got[:, 3:], logits(model), atol=1e-5, rtol=1e-5)


def test_another_model_of_the_same_config_is_left_alone() -> None:
    model, other = tiny(), tiny()
    other.config = other.model.config = model.config
    for block in other.model.layers:
        block.self_attn.config = model.config
    before = logits(other)
    add_prefix(model)
    torch.testing.assert_close(logits(other), before, atol=1e-6, rtol=1e-5)


def test_mistakes() -> None:
    model = moved(tiny())
    before = logits(model)
    with pytest.raises(WeftError, match="there is 'ntk-attention' on this model already"):
        add_prefix(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(WeftError, match="cannot be exchanged"):
        add_prefix(tiny_gpt2())
