"""sft: the invariants of SpIEL's card, with every gradient checked against the dense ones of the model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.moving import moving_terms
from weft.errors import WeftError
from weft.methods import METHODS
from weft.rules import Rules
from weft.terms.adapters import find_adapter
from weft.testing_adapters import RANK, adapted, task, tiny_llama, train
from weft.verbs.adapt import adapt, make_optimizer, merge_adapter, rules


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(task()[0]["input_ids"]).logits
    return out


def entries_of(model: nn.Module) -> dict[str, Tensor]:
    """layer -> the flat positions that are trained."""
    return {layer: terms["default"].positions.long() for layer, terms in find_adapter(model).terms.items()}


def weight_gradients(step: int) -> dict[str, Tensor]:
    """layer -> the dense gradient (out, in) of the base on the batch of a step of `train`."""
    model = tiny_llama().train()
    model(**task()[step % 4]).loss.backward()
    return {name: m.weight.grad for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_sft_grows_where_the_gradient_is_large_and_seeds_with_what_it_saw() -> None:
    """At learning rate 0 every gradient is the base's, so the whole first phase (p = 1) is known beforehand."""
    model = adapted(METHODS["sft"], interval=20, phase=4)
    first = entries_of(model)
    rule, optimizer = Rules(rules(model)), make_optimizer(model, 0.0)
    train_with(model, rule, optimizer, range(1, 5))
    gradients = [weight_gradients(step) for step in range(1, 5)]
    for layer, term in moving_terms(model, "default").items():
        proposed = gradients[0][layer].abs().flatten().topk(term.nonzeros).indices.sort().values
        assert torch.equal(term.positions.long(), proposed)
        seen = torch.stack([g[layer].flatten()[proposed] for g in gradients[1:]])
        stayed, entries = torch.isin(proposed, first[layer]), optimizer.entries(term.values)
        assert stayed.any() and not stayed.all()
        assert (entries.age[stayed] == 4).all() and (entries.age[~stayed] == 3).all()
        means, squares = entries.exp_avg / (1 - 0.9**3), entries.exp_avg_sq / (1 - 0.999**3)
        torch.testing.assert_close(means[~stayed], seen.mean(0)[~stayed], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(squares[~stayed], seen.square().mean(0)[~stayed], atol=1e-7, rtol=1e-3)


def train_with(model: nn.Module, rule: Rules, optimizer: torch.optim.Optimizer, steps: range, parts: int = 1) -> None:
    """Train on the batches of `train`, each in so many micro-batches."""
    rule.bind(optimizer)
    rule.start(model, steps=100)
    model.train()
    for step in steps:
        for part in range(parts):
            (model(**{key: t[part::parts] for key, t in task()[step % 4].items()}).loss / parts).backward()
        rule.before_step(model, step)
        optimizer.step()
        rule.after_step(model, step)
        optimizer.zero_grad()


def test_sft_sums_over_micro_batches() -> None:
    totals = []
    for parts in (1, 2):
        model = adapted(METHODS["sft"], phase=4)
        rule = rules(model)[0]
        train_with(model, Rules([rule]), make_optimizer(model, 0.0), range(1, 4), parts)
        totals.append(rule.probes)
    for layer, whole in totals[0].items():
        halves = totals[1][layer]
        both = torch.isin(whole.positions, halves.positions)
        other = torch.isin(halves.positions, whole.positions)
        assert whole.steps == halves.steps == 2 and both.any()
        torch.testing.assert_close(halves.total[other], whole.total[both], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(halves.squares[other], whole.squares[both], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("grow", ["ag", "ma"])
def test_sft_keeps_its_budget_and_drops_back_to_the_base(grow: str) -> None:
    model = adapted(METHODS["sft"], interval=3, phase=2, rate=0.3, grow=grow)
    assert torch.equal(logits(model), logits(tiny_llama()))
    state, moves, previous = None, 0, entries_of(model)
    for step in range(9):
        _, state = train(model, 1, lr=1e-2, start=step, state=state)
        for layer, term in moving_terms(model, "default").items():
            assert len(term.positions.unique()) == term.nonzeros and term.settled.numel() == 0
            came = ~torch.isin(term.positions, previous[layer])
            assert not term.values[came].any() or not came.any()
            if came.any():
                assert step % 3 == 1, "entries have moved outside the end of a phase"
                moves += 1
            if step == 4:
                assert int(came.sum()) <= int(0.3 * term.nonzeros)
            previous[layer] = term.positions.clone()
    assert moves > len(previous), "entries have moved only once"
    plain, active = tiny_llama(), entries_of(model)
    merge_adapter(model)
    for layer, positions in active.items():
        same = (plain.get_submodule(layer).weight == model.get_submodule(layer).weight).flatten()
        assert same.index_fill(0, positions, True).all(), "an entry that is not trained differs from the base"


def test_sft_drops_what_has_moved_least() -> None:
    model = adapted(METHODS["sft"], interval=3, phase=2, rate=0.25)
    rule, optimizer = Rules(rules(model)), make_optimizer(model, 1e-2)
    train_with(model, rule, optimizer, range(1, 5))
    model(**task()[1]).loss.backward()
    rule.before_step(model, 5)
    optimizer.step()
    terms = moving_terms(model, "default")
    before = {layer: (t.positions.clone(), t.values.detach().abs()) for layer, t in terms.items()}
    rule.after_step(model, 5)
    dropped = 0
    for layer, term in terms.items():
        positions, sizes = before[layer]
        gone = ~torch.isin(positions, term.positions)
        least = sizes.sort().values[: int(0.25 * term.nonzeros)]
        dropped += int(gone.sum())
        assert not gone.any() or sizes[gone].max() <= least[-1]
    assert dropped > 0


def test_sft_sees_dense_gradients_in_the_phase_alone_and_holds_none() -> None:
    model = adapted(METHODS["sft"], interval=5, phase=2)
    rule, optimizer = Rules(rules(model)), make_optimizer(model, 1e-3)
    terms = moving_terms(model, "default").values()
    train_with(model, rule, optimizer, range(1, 2))
    assert all(term.probe is not None and term.probe.grad is None for term in terms)
    assert all(term.probe.untyped_storage().nbytes() == 4 for term in terms)
    for step, phase in ((1, True), (3, False), (4, False), (5, True)):  # the next phase begins with step 6
        rule.after_step(model, step)
        assert all((term.probe is not None) is phase for term in terms), f"after step {step}"


def test_sft_drops_the_published_share() -> None:
    model = adapted(METHODS["sft"])
    (rule,) = rules(model)
    rule.start(model, steps=100)
    assert [rule.share(step) for step in (5, 25, 65, 100, 120)] == [1.0, 0.2 * 0.75, pytest.approx(0.07), 0.0, 0.0]


def test_sft_with_nothing_to_drop_is_masked_adam() -> None:
    model = adapted(METHODS["sft"], interval=2, phase=2, rate=0.0)
    _, state = train(model, 2, lr=1e-2)  # the first phase moves all
    term = next(iter(moving_terms(model, "default").values()))
    positions, twin = term.positions.clone(), copy.deepcopy(model)
    train(model, 4, lr=1e-2, start=2, state=copy.deepcopy(state))
    train(twin, 4, lr=1e-2, start=2, state=(copy.deepcopy(state[0]), {}), rule=Rules([]))
    other = next(iter(moving_terms(twin, "default").values()))
    assert torch.equal(term.positions, positions) and torch.equal(term.values, other.values)


@pytest.mark.parametrize("options", [{"phase": 1}, {"phase": 30}, {"grow": "sm3"}])
def test_sft_refuses_what_makes_no_sense(options: dict[str, Any]) -> None:
    model = tiny_llama()
    with pytest.raises(WeftError, match="phase" if "phase" in options else "'ag'"):
        adapt(model, "sft", RANK, **options)
    assert torch.equal(logits(model), logits(tiny_llama()))
