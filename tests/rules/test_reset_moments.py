"""A reset optimizer steps as a new one would; embeddings of a factored model keep what they have."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

import weft.optim
from weft.errors import WeftError
from weft.rules.reset_moments import ResetMoments
from weft.train.sizes import fresh_model
from weft.verbs.fresh import restructure

SIZES = {"vocab_size": 31, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def model_of():
    return fresh_model(LlamaConfig(**SIZES, num_attention_heads=2), 0)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


MAKERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "galore": lambda model: weft.optim.galore(model, rank=8, refresh=3, projection="svd"),
    "galore_8bit": lambda model: weft.optim.galore_8bit(model, rank=64, refresh=3, projection="svd"),
    "dct_adamw": lambda model: weft.optim.dct_adamw(model, rank=8),
    "frugal": lambda model: weft.optim.frugal(model, rank=8, refresh=3, projection="svd"),
    "lion": lambda model: weft.optim.frugal(model, rank=8, refresh=3, projection="svd", inner="lion"),
    "sgd": lambda model: weft.optim.frugal(model, rank=8, refresh=3, projection="svd", inner="sgd"),
}


def bound(rule, optimizer, model):
    rule.bind(optimizer)
    rule.start(model)
    return rule


@pytest.mark.parametrize("name", MAKERS)
def test_the_step_after_a_reset_is_a_first_step(name):
    model = model_of()
    optimizer = MAKERS[name](model)
    for step in (1, 2, 3):
        gradients(model, step)
        optimizer.step()
    bound(ResetMoments(3), optimizer, model).after_step(model, 3)
    fresh = model_of()
    fresh.load_state_dict(model.state_dict())
    first = MAKERS[name](fresh)
    for each, stepped in ((model, optimizer), (fresh, first)):
        gradients(each, 4)
        stepped.step()
    for (label, ours), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=lambda m, label=label: f"{label}: {m}")


def test_a_factored_model_loses_the_moments_of_its_factors_alone():
    model = restructure(model_of(), "low-rank", 8, 0)
    optimizer = weft.optim.galore(model, rank=4)
    for step in (1, 2):
        gradients(model, step)
        optimizer.step()
    rule = bound(ResetMoments(2), optimizer, model)
    rule.after_step(model, 1)
    assert all(optimizer.state[p]["exp_avg"].any() for p in model.parameters())
    bases = {name: optimizer.state[p].get("basis") for name, p in model.named_parameters()}
    bases = {name: basis.clone() for name, basis in bases.items() if basis is not None}
    rule.after_step(model, 2)
    for name, parameter in model.named_parameters():
        state, factor = optimizer.state[parameter], ".terms." in name or "low_rank" in name
        assert bool(state["exp_avg"].any() or state["exp_avg_sq"].any()) != factor, name
        assert int(state["step"]) == (0 if factor else 2), name
        assert int(state["count"]) == 2, "the refresh keeps its own time"
        if name in bases:
            assert torch.equal(state["basis"], bases[name])
    bound(ResetMoments(2, terms_only=False), optimizer, model).after_step(model, 2)
    assert not any(optimizer.state[p]["exp_avg"].any() for p in model.parameters())


def test_moments_beside_the_optimizer_are_not_reached() -> None:
    model = restructure(model_of(), "dqt")
    with pytest.raises(WeftError, match="numbers of 8 bits in training have theirs beside it: leave --reset-moments"):
        ResetMoments(2).start(model, steps=4)
