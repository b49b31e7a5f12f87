"""The smooth count of activations against closed forms, and what it sees of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import weft
from weft.errors import WeftError
from weft.methods import METHODS
from weft.rules import Rules
from weft.rules.density import DensityPenalty, activation_density, activations, smooth_density
from weft.testing_adapters import adapted, task, tiny_gpt2, tiny_llama, train
from weft.verbs.adapt import rules, trainable

EPS = 1e-7


def one(a: Tensor, eps: float = EPS) -> Tensor:
    return smooth_density(a, eps, torch.full(a.shape[:-1], 1 / max(a[..., 0].numel(), 1)))


def test_values_of_the_smooth_count() -> None:
    values = [(0.0, 0.0), (EPS**0.5, 0.5), (1e-3, 0.909), (5.0, 1.0), (-5.0, 1.0)]
    for a, expected in values:
        assert float(one(torch.full((3, 4), a))) == pytest.approx(expected, abs=1e-3)
    a = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).relu()
    assert float(one(a, 1e-14)) == pytest.approx(float((a != 0).float().mean()), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_is_autograds(dtype: torch.dtype) -> None:
    a = torch.tensor([[1e-4, (EPS / 3) ** 0.5, 1e-3, 1.0, 0.0, -2e-4]]).to(dtype)
    mine = a.clone().requires_grad_(True)
    one(mine).backward()
    wide = a.double().requires_grad_(True)
    (wide.square() / (wide.square() + EPS)).mean().backward()
    assert mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad.double(), wide.grad, rtol=2e-3, atol=1e-7)
    if dtype is torch.float32:
        assert float(mine.grad[0, 1]) * 6 == pytest.approx(2054, rel=1e-3)
        assert float(mine.grad[0, 3]) * 6 == pytest.approx(2e-7, rel=1e-2)


def penalty(model: nn.Module, **batch: Tensor) -> Tensor:
    rule = Rules(rules(model))
    rule.start(model, steps=9)
    model.train()(**batch)
    found = rule.penalty(model)
    assert found is not None
    return found


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_penalty_is_the_mean_over_blocks_tokens_and_units(make: object) -> None:
    model = adapted(METHODS["deft"], make, eps=1e-2)
    seen = []
    handles = [m.register_forward_hook(lambda m, args, a: seen.append(a)) for m in activations(model).values()]
    found = penalty(model, **task()[0])
    expected = torch.stack([(a.square() / (a.square() + 1e-2)).mean() for a in seen]).mean()
    assert len(handles) == len(seen) == 1
    torch.testing.assert_close(found, expected)


def test_padding_does_not_count() -> None:
    model = adapted(METHODS["deft"], eps=1e-2)
    ids = task()[0]["input_ids"][:, :8]
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    padded_mask = torch.cat([mask, torch.zeros_like(mask)], 1)
    short = penalty(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(penalty(model, input_ids=padded, attention_mask=padded_mask), short)
    assert not torch.allclose(penalty(model, input_ids=padded), short)
    by_layer = activation_density(model, [{"input_ids": padded, "attention_mask": padded_mask}], 0.1)
    assert by_layer == pytest.approx(activation_density(model, [{"input_ids": ids}], 0.1))


def test_the_count_does_not_depend_on_the_size_of_the_batch() -> None:
    model = adapted(METHODS["deft"], eps=1e-2)
    one_row = task()[0]["input_ids"][:1]
    torch.testing.assert_close(penalty(model, input_ids=one_row.repeat(3, 1)), penalty(model, input_ids=one_row))


def test_encoder_and_decoder_add_up() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = weft.adapt(T5ForConditionalGeneration(config), "deft", 2, targets=["wi"], eps=1e-2)
    seen: dict[str, Tensor] = {}
    for name, module in activations(model).items():
        module.register_forward_hook(lambda m, args, a, name=name: seen.update({name: a}))
    ids = task()[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    found = penalty(model.train(), input_ids=ids, attention_mask=mask, labels=ids[:, :5].contiguous())
    sides = {"encoder": [], "decoder": []}
    for name, a in seen.items():
        a = a[:, :10] if name.startswith("encoder") else a
        sides[name.partition(".")[0]].append((a.square() / (a.square() + 1e-2)).mean())
    assert [len(found_of) for found_of in sides.values()] == [2, 2]
    torch.testing.assert_close(found, sum(torch.stack(values).mean() for values in sides.values()))


def test_weight_zero_is_the_plain_adapter() -> None:
    silent, plain = adapted(METHODS["deft"], weight=0.0), adapted(METHODS["deft"], weight=0.0)
    assert train(silent, 3)[0] == train(plain, 3, rule=Rules([]))[0]
    assert not any(m._forward_hooks for m in silent.modules())


def test_nothing_is_held_between_steps_and_hooks_do_not_pile_up() -> None:
    model = adapted(METHODS["deft"])
    for _ in range(2):
        rule = Rules(rules(model))
        train(model, 2, rule=rule)
        assert not rule.rules[0].recorder.values
        assert [len(m._forward_hooks) for m in activations(model).values()] == [1]
        assert len(model._forward_pre_hooks) == len(model._forward_pre_hooks_with_kwargs) == 1
    copy.deepcopy(model)
    ids = task()[0]["input_ids"]
    weft.remove_adapter(model)
    assert not penalty_of_anything(model.train(), ids, rule)


def penalty_of_anything(model: nn.Module, ids: Tensor, rule: Rules) -> bool:
    model(input_ids=ids)
    return bool(rule.rules[0].recorder.values)


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(METHODS["deft"], eps=1e-2).train()
        rule = Rules(rules(model))
        rule.start(model, steps=9)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):  # two micro-batches
            loss = model(**task()[0]).loss
            (0 * loss + rule.penalty(model)).backward()
            assert not rule.rules[0].recorder.values
        found.append({name: p.grad for name, p in trainable(model).parameters.items()})
    plain, checkpointed = found
    moved = [name for name, grad in plain.items() if grad.any()]
    assert any("gate_proj" in name for name in moved)
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-9) for name in plain)


def test_a_lean_model_is_seen_as_well() -> None:
    model = adapted(METHODS["deft"], eps=1e-2)
    plain = penalty(model, **task()[0]).detach()
    torch.testing.assert_close(penalty(weft.lean(model), **task()[0]).detach(), plain)


class ReluMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[0](x)
        return y


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_training_with_the_penalty_lowers_the_exact_density(weight: float) -> None:
    torch.manual_seed(0)
    # a mean, for without one half of the units are open whatever the weights
    model, x = ReluMlp(), torch.randn(64, 8) + 1
    before = activation_density(model, [{"x": x}])["blocks.0.1"]
    weft.adapt(model, "deft", 4, weight=weight, eps=1.0)
    rule = Rules(rules(model))
    rule.start(model, steps=9)
    optimizer = torch.optim.AdamW(trainable(model).parameters.values(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model.train()(x) - x).square().mean()
        extra = rule.penalty(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
    after = activation_density(model, [{"x": x}])["blocks.0.1"]
    assert (after < before - 0.08) is bool(weight), (before, after)


def test_refusals() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(WeftError, match="no activation modules"):
        activations(plain)
    with pytest.raises(WeftError, match="eps is 0"):
        DensityPenalty(weight=1.0, eps=0)
    model = adapted(METHODS["deft"])
    rule = Rules(rules(model))
    rule.start(model, steps=9)
    with torch.no_grad():
        model.train()(**task()[0])
    with pytest.raises(WeftError, match="use_reentrant=False"):
        rule.penalty(model)
