"""Adversarial batches of older weights against a plain loop in fp64 that keeps those weights itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from weft.errors import WeftError
from weft.rules.adversary import ConcurrentAdversary

STEPS = 20


def plain() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().train()


def batch(step: int) -> Tensor:
    return torch.randint(20, (3, 10), generator=torch.Generator().manual_seed(step))


def run(rule: ConcurrentAdversary | None, steps: int = STEPS) -> tuple[LlamaForCausalLM, list[float]]:
    model, found = plain(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if rule is not None:
        rule.start(model, steps=steps)
    for step in range(1, steps + 1):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        penalty = None if rule is None else rule.penalty(model)
        total = loss if penalty is None else loss + penalty
        total.backward()
        if rule is not None:
            rule.before_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if rule is not None:
            rule.after_step(model, step)
        found.append(float(total.detach()))
    return model, found


def lossof(model: LlamaForCausalLM, e: Tensor, ids: Tensor) -> Tensor:
    logits = model(inputs_embeds=e).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, 20), ids[:, 1:].reshape(-1))


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_it_follows_its_lines(delay):
    model, older, losses = plain(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, STEPS + 1):
        ids = batch(step)
        table = model.get_input_embeddings().weight
        loss = lossof(model, table[ids], ids)
        older.append(copy.deepcopy(model))
        if step > delay:
            e = table[ids].detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(lossof(older[-1 - delay], e, ids), e)
            d = 0.2 * e.detach().square().mean().sqrt() * torch.where(slope > 0, 1.0, -1.0)
            loss = loss + 0.5 * lossof(model, table[ids] + d, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    trained, found = run(ConcurrentAdversary(0.2, 0.5, delay))
    assert found == pytest.approx(losses, rel=1e-6)
    for one, other in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not trained._forward_pre_hooks


@pytest.mark.parametrize(("eps", "omega"), [(0.0, 1.0), (0.3, 0.0)])
def test_without_eps_or_weight_it_is_plain_training(eps, omega):
    assert run(ConcurrentAdversary(eps, omega, 1))[1] == run(None)[1]


def test_the_attack_raises_the_loss_and_leaves_the_gradients_alone():
    model, rule, ids = plain(), ConcurrentAdversary(0.2, 1.0, 0), batch(1)
    rule.start(model, steps=5)
    moved = rule.moved(model, {"input_ids": ids, "labels": ids})
    assert all(p.grad is None for p in model.parameters())
    e = model.get_input_embeddings().weight[ids]
    assert float((moved - e).abs().max().detach()) == pytest.approx(0.2 * float(e.square().mean().sqrt().detach()))
    assert float(lossof(model, moved, ids).detach()) > float(lossof(model, e, ids).detach())


def test_older_weights_go_with_the_state():
    rule = ConcurrentAdversary(0.2, 1.0, 2)
    model, _ = run(rule, 4)
    other = ConcurrentAdversary(0.2, 1.0, 2)
    other.start(model, steps=9)
    other.load_state_dict(rule.state_dict())
    assert len(other.older) == 2
    for one, two in zip(rule.older, other.older, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_its_loss_is_a_mean_however_many_batches_a_step_has() -> None:
    model, rule = plain(), ConcurrentAdversary(eps=1e-9, omega=0.5, delay=0)
    rule.start(model, steps=2)
    ids = batch(1)
    summed = model(input_ids=ids, labels=ids, num_items_in_batch=4 * 27).loss  # of four such batches
    penalty = rule.penalty(model)
    assert penalty is not None and float(penalty) == pytest.approx(0.5 * 4 * float(summed), rel=1e-6)


def test_wrong_options_are_sentences():
    for bad in ((-1.0, 1.0, 1), (0.1, 1.0, 0.5), (0.1, -1.0, 0)):
        with pytest.raises(WeftError, match="give numbers from 0, delay a whole one"):
            ConcurrentAdversary(*bad)
