"""The adapters that train chosen columns or entries of a weight: each card's invariants."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import weft
from tests.methods.moving import moving_terms
from weft.io.adapters import load_adapter, save_adapter
from weft.memory import lean_report
from weft.memory.measure import saved_bytes
from weft.methods import METHODS
from weft.optim.entries import EntryAdamW
from weft.rules import Rules
from weft.rules.principal_mask import principal_entries
from weft.rules.support import move
from weft.terms import Columns, Dense, MovingSparse, NormalFloat, SumLinear
from weft.terms.adapters import find_adapter
from weft.testing_adapters import RANK, adapted, task, tiny_llama, train
from weft.verbs.adapt import adapt, disable, effective_rates, make_optimizer, merge_adapter, remove_adapter, rules

IDS = task()[0]["input_ids"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(IDS).logits
    return out


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved_numbers(layer: nn.Module, x: Tensor) -> int:
    """How many numbers autograd keeps of activations, beside the parameters and buffers."""
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(kept.values())


# paca


def paca_layer(out: int = 12, inn: int = 10, rank: int = 3, scale: float = 2.0, seed: int = 0) -> SumLinear:
    """A frozen weight and trained columns, not at their start."""
    base = Dense.from_matrix(draw(out, inn, seed=seed)).requires_grad_(False)
    columns = torch.randperm(inn, generator=torch.Generator().manual_seed(seed))[:rank]
    return SumLinear({"base": base, "paca": Columns.from_columns(draw(out, rank, seed=1), columns, inn, scale=scale)})


@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_paca_gradients_are_those_of_the_whole_weight_on_its_columns(lead: tuple[int, ...]) -> None:
    layer = paca_layer()
    term: Columns = layer.terms["paca"]  # type: ignore[assignment]
    x = draw(*lead, 10, seed=2).requires_grad_()
    direction = draw(*lead, 12, seed=3)
    (layer(x) * direction).sum().backward()
    weight = layer.dense().detach().requires_grad_()
    plain = x.detach().clone().requires_grad_()
    (nn.functional.linear(plain, weight) * direction).sum().backward()
    assert weight.grad is not None and term.B.grad is not None
    torch.testing.assert_close(term.B.grad, 2.0 * weight.grad[:, term.columns.long()], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad, plain.grad, atol=1e-5, rtol=1e-6)


def test_paca_keeps_r_channels_of_the_input() -> None:
    x = draw(4, 7, 10).requires_grad_()
    assert saved_numbers(paca_layer(rank=3), x) == 4 * 7 * 3


def test_paca_on_all_columns_with_scale_one_is_full_tuning() -> None:
    x, target = draw(20, 10, seed=4), draw(20, 12, seed=5)
    base = draw(12, 10)
    term = Columns.from_columns(torch.zeros(12, 10), torch.arange(10), 10)
    layer = SumLinear({"base": Dense.from_matrix(base).requires_grad_(False), "paca": term})
    full = nn.Linear(10, 12, bias=False)
    full.weight.data.copy_(base)
    for module in (layer, full):
        nn.functional.mse_loss(module(x), target).backward()
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5).step()
    torch.testing.assert_close(layer.dense(), full.weight, atol=1e-6, rtol=1e-6)


def test_paca_starts_at_the_base_and_leaves_other_columns_alone() -> None:
    plain, model = tiny_llama(), adapted(METHODS["paca"], alpha=8.0)
    assert torch.equal(logits(model), logits(plain))
    train(model, 5)
    adapter = find_adapter(model)
    chosen = {layer: terms["default"].columns.long() for layer, terms in adapter.terms.items()}
    moved = logits(model)
    with disable(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), moved)
    merge_adapter(model)
    for layer, columns in chosen.items():
        before, after = plain.get_submodule(layer).weight, model.get_submodule(layer).weight
        others = torch.ones(before.shape[1], dtype=torch.bool).index_fill_(0, columns, False)
        assert len(columns) == RANK and torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, columns], after[:, columns])


def test_paca_logs_the_rate_of_the_columns_themselves() -> None:
    assert effective_rates(adapted(METHODS["paca"], alpha=12.0), 1e-3) == {"default": pytest.approx(12e-3 / RANK)}


def test_paca_chooses_the_same_columns_for_layers_of_one_input(tmp_path: Path) -> None:
    model, again, other = (
        adapted(METHODS["paca"]),
        adapted(METHODS["paca"]),
        adapt(tiny_llama(), "paca", RANK, seed=4),
    )
    columns = {layer: terms["default"].columns for layer, terms in find_adapter(model).terms.items()}
    layers = "model.layers.0."
    for first, second in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert torch.equal(columns[layers + first], columns[layers + second])
    alone = adapt(tiny_llama(), "paca", RANK, targets="v_proj", seed=3)
    assert torch.equal(find_adapter(alone).terms[layers + "self_attn.v_proj"]["default"].columns,
                       columns[layers + "self_attn.v_proj"])  # fmt: skip
    same = {layer: terms["default"].columns for layer, terms in find_adapter(again).terms.items()}
    assert all(torch.equal(columns[layer], same[layer]) for layer in columns)
    assert any(
        not torch.equal(columns[layer], terms["default"].columns) for layer, terms in find_adapter(other).terms.items()
    )
    save_adapter(model, tmp_path / "adapter", format="weft")
    loaded = load_adapter(tiny_llama(), tmp_path / "adapter")
    for layer, terms in find_adapter(loaded).terms.items():
        assert torch.equal(terms["default"].columns, columns[layer])


def test_paca_is_a_lora_with_frozen_selectors(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(METHODS["paca"], alpha=12.0)
    train(model, 5)
    save_adapter(model, tmp_path / "adapter", format="peft")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for layer, terms in find_adapter(model).terms.items():
        A, B = (state[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(B @ A, terms["default"].dense().detach()), "the LoRA is not exactly the change"
        assert A.sum() == RANK and A.max() == 1
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    expected = logits(model)
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert torch.equal(logits(remove_adapter(model)), logits(tiny_llama()))


# the entries that move

MOVING: list[tuple[str, dict[str, Any]]] = [
    ("lift", {"filter_rank": 1, "interval": 2}),
    ("sft", {"interval": 4, "phase": 4}),  # a phase is under way after step 3
    ("sft", {"interval": 3, "phase": 2, "steps": 20}),
    ("sft", {"interval": 3, "phase": 2, "grow": "ma"}),
]
"""Methods and options that move entries within six steps."""


# random-mask


def entries_of(model: nn.Module) -> dict[str, Tensor]:
    """layer -> the flat positions that are trained."""
    return {layer: terms["default"].positions.long() for layer, terms in find_adapter(model).terms.items()}


def test_random_masks_are_distinct_entries_of_the_budget_and_depend_on_seed_and_layer() -> None:
    model, same = adapted(METHODS["random-mask"]), adapted(METHODS["random-mask"])
    other = adapt(tiny_llama(), "random-mask", RANK, seed=4)
    first, second, third = entries_of(model), entries_of(same), entries_of(other)
    for layer, positions in first.items():
        out, inn = model.get_submodule(layer).out_features, model.get_submodule(layer).in_features
        assert len(positions) == len(positions.unique()) == RANK * (out + inn) and int(positions.max()) < out * inn
        assert torch.equal(positions, second[layer]) and not torch.equal(positions, third[layer])
    assert not torch.equal(first["model.layers.0.self_attn.q_proj"], first["model.layers.0.self_attn.v_proj"])
    everything = entries_of(adapt(tiny_llama(), "random-mask", 16, targets="q_proj"))  # more than there are
    assert all(torch.equal(positions, torch.arange(16 * 16)) for positions in everything.values())
    sparse = adapt(tiny_llama(), "random-mask", 1, targets="up_proj", density=0.1)
    assert all(len(positions) == round(0.1 * 32 * 16) for positions in entries_of(sparse).values())


def test_random_mask_equals_pefts_shira() -> None:
    """The same mask, the same values: the same function, and the same gradients."""
    peft = pytest.importorskip("peft")
    ours = adapted(METHODS["random-mask"])
    adapter = find_adapter(ours)
    masks = iter([terms["default"] for terms in adapter.terms.values()])

    def mask_of(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        mask = torch.zeros_like(base_layer.weight)
        mask.view(-1)[next(masks).positions.long()] = 1
        return mask

    modules = [layer.rpartition(".")[2] for layer in adapter.terms]
    config = peft.ShiraConfig(r=RANK, target_modules=modules, mask_type="random")
    config.mask_fn = mask_of
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), config)
    for index, (layer, terms) in enumerate(adapter.terms.items()):
        values = 0.1 * draw(terms["default"].nonzeros, seed=index)
        terms["default"].values.data.copy_(values)
        theirs.get_base_model().get_submodule(layer).shira_weight["default"].data.copy_(values)
    expected = logits(theirs)
    assert float((expected - logits(tiny_llama())).abs().max()) > 1e-2
    torch.testing.assert_close(logits(ours), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    for model in (ours, theirs):
        model(**task()[0]).loss.backward()
    for layer, terms in adapter.terms.items():
        gradient = theirs.get_base_model().get_submodule(layer).shira_weight["default"].grad
        torch.testing.assert_close(terms["default"].values.grad, gradient, atol=1e-6, rtol=1e-4)


# lift


def noisy_signal(size: int = 64, rank: int = 4) -> Tensor:
    return draw(size, size) + 0.4 * draw(size, rank, seed=1) @ draw(rank, size, seed=2)


def reduced(weight: Tensor, rank: int) -> Tensor:
    """The best rank-r approximation, in fp64."""
    U, s, V = torch.linalg.svd(weight.double(), full_matrices=False)
    return U[:, :rank] @ torch.diag(s[:rank]) @ V[:rank]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("randomized", [False, True])
def test_lift_chooses_the_largest_entries_of_the_reduced_weight(shape: tuple[int, int], randomized: bool) -> None:
    weight = draw(*shape) + 3 * draw(shape[0], 2, seed=1) @ draw(2, shape[1], seed=2)
    chosen = principal_entries(weight, 2, 50, randomized=randomized, generator=torch.Generator().manual_seed(0))
    low = reduced(weight, 2).abs().flatten()
    outside = torch.ones(low.numel(), dtype=torch.bool).index_fill_(0, chosen, False)
    assert len(chosen) == 50 and torch.equal(chosen, chosen.unique())
    assert low[chosen].min() >= low[outside].max() * (1 - 1e-4)
    assert torch.equal(chosen, principal_entries(3 * weight, 2, 50)) or randomized


def test_lift_with_full_filter_is_the_magnitude_mask_and_approaches_it_from_far() -> None:
    weight, count = noisy_signal(), 200
    magnitude = weight.abs().flatten().topk(count).indices
    shares = [torch.isin(principal_entries(weight, f, count), magnitude).float().mean() for f in (4, 16, 32, 64)]
    assert shares == sorted(shares) and shares[0] < 0.6 and shares[-1] == 1.0


def test_lift_starts_on_the_mask_of_its_own_weight() -> None:
    model = adapted(METHODS["lift"], filter_rank=2)
    for layer, positions in entries_of(model).items():
        weight = tiny_llama().get_submodule(layer).weight.detach()
        assert torch.equal(positions, principal_entries(weight, 2, RANK * sum(weight.shape)))


def test_lift_on_all_entries_is_adamw_on_the_weights() -> None:
    model, full = adapt(tiny_llama(), "lift", 16, interval=2), tiny_llama()
    layers = list(find_adapter(model).terms)
    full.requires_grad_(False)
    weights = [full.get_submodule(layer).weight.requires_grad_() for layer in layers]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    train(model, 5)
    for step in range(1, 6):
        full.train()(**task()[step % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(model.get_submodule(layer).dense(), weight.detach(), atol=1e-6, rtol=1e-5)


def test_lift_keeps_what_it_learned_where_it_no_longer_trains() -> None:
    """Entries never chosen stay bit for bit; W is base + the file's entries at every moment; the budget stays."""
    model = adapted(METHODS["lift"], filter_rank=1, interval=2)
    plain, ever = tiny_llama(), {layer: set(p.tolist()) for layer, p in entries_of(model).items()}
    state, before, moved = None, {}, 0
    for step in range(8):
        _, state = train(model, 1, lr=5e-2, start=step, state=state)
        for layer, term in moving_terms(model, "default").items():
            assert len(term.positions.unique()) == term.nonzeros
            assert not torch.isin(term.positions, term.settled_positions).any()
            moved += len(set(term.positions.tolist()) - ever[layer])
            ever[layer] |= set(term.positions.tolist())
            if layer in before and step % 2 == 0:  # no refresh: what was settled does not move
                assert torch.equal(term.settled, before[layer])
            before[layer] = term.settled.clone()
    assert moved > 0 and any(len(settled) for settled in before.values()), "no refresh has changed a mask"
    changes = {layer: term.dense().detach() for layer, term in moving_terms(model, "default").items()}
    merge_adapter(model)
    for layer, change in changes.items():
        base, after = plain.get_submodule(layer).weight.detach(), model.get_submodule(layer).weight.detach()
        assert torch.equal(after, base + change)
        never = torch.ones(base.numel(), dtype=torch.bool).index_fill_(0, torch.tensor(sorted(ever[layer])), False)
        assert torch.equal(after.flatten()[never], base.flatten()[never])


@pytest.mark.parametrize("settle", [True, False])
def test_a_move_keeps_survivors_bit_for_bit_and_starts_newcomers_from_nothing(settle: bool) -> None:
    term = MovingSparse.at(torch.tensor([3, 1, 8, 20]), 5, 6, dtype=torch.float32)
    optimizer = EntryAdamW([term.values], lr=0.1)
    optimizer.choose(term.values, torch.arange(4))
    for seed in range(3):
        term.values.grad = draw(4, seed=seed)
        optimizer.step()
    state, before = optimizer.state[term.values], term.dense().detach().flatten()
    held = {name: tensor.clone() for name, tensor in state.items() if isinstance(tensor, Tensor)}
    new = move(term, torch.tensor([29, 8, 0, 1]), state, settle=settle)  # 3 and 20 go, 0 and 29 come
    assert term.positions.tolist() == [0, 1, 8, 29] and new.tolist() == [True, False, False, True]
    for name in ("age", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][[1, 2]], held[name][[0, 2]]) and not state[name][[0, 3]].any()
    assert torch.equal(state["index"], torch.arange(4)) and state["age"].tolist() == [0, 3, 3, 0]
    after = term.dense().detach().flatten()
    expected = before.clone()
    if not settle:
        expected[[3, 20]] = 0.0
    assert torch.equal(after, expected)
    term.values.grad = torch.ones(4)
    optimizer.step()
    assert state["age"].tolist() == [1, 4, 4, 1]
    if settle:  # one that comes back is where it was
        value = before[20]
        move(term, torch.tensor([20, 8, 0, 1]), state, settle=True)
        assert term.values[3] == value and 20 not in term.settled_positions


def test_lift_holds_two_moments_an_entry() -> None:
    model = adapted(METHODS["lift"])
    optimizer = make_optimizer(model, 1e-3)
    assert isinstance(optimizer, EntryAdamW)
    for term in moving_terms(model, "default").values():
        moments = [t for t in optimizer.state[term.values].values() if isinstance(t, Tensor) and t.is_floating_point()]
        assert sum(t.numel() for t in moments) == 2 * term.nonzeros


@pytest.mark.parametrize(("name", "options"), MOVING)
def test_choices_and_ages_resume_bit_for_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    straight, halfway = adapted(METHODS[name], **options), adapted(METHODS[name], **options)
    _, final = train(straight, 6, lr=2e-2)
    _, state = train(halfway, 3, lr=2e-2)
    save_adapter(halfway, tmp_path / "adapter", format="weft")
    resumed = load_adapter(tiny_llama(), tmp_path / "adapter")
    _, again = train(resumed, 3, lr=2e-2, start=3, state=copy.deepcopy(state))
    for layer, term in moving_terms(straight, "default").items():
        other = moving_terms(resumed, "default")[layer].state_dict()
        for key, tensor in term.state_dict().items():
            assert torch.equal(tensor, other[key]), f"{key} of {layer} differs"
    for mine, theirs in zip(final[0]["state"].values(), again[0]["state"].values(), strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items() if isinstance(value, Tensor))
    start = entries_of(adapted(METHODS[name], **options))
    assert any(not torch.equal(p, start[layer]) for layer, p in entries_of(straight).items()), "nothing has moved"


def test_steps_below_the_spacing_of_bf16_are_kept() -> None:
    model = adapted(METHODS["lift"], lambda: tiny_llama(torch.bfloat16), filter_rank=2)
    train(model, 3, lr=1e-6)
    layer, term = next(iter(moving_terms(model, "default").items()))
    assert term.values.dtype == torch.float32 and (term.values != 0).any()
    weight = tiny_llama(torch.bfloat16).get_submodule(layer).weight.detach()
    exact = model.get_submodule(layer).dense(torch.float32).detach()
    assert torch.equal(exact, weight.float() + term.dense(torch.float32).detach())
    assert (exact.bfloat16() == weight).float().mean() > 0.9, "the steps were to be too small for bf16"
    assert max(merge_adapter(model).values()) > 0.5, "merging does not say that the cast loses the update"


def test_lift_moves_with_any_optimizer_and_with_none() -> None:
    model = adapted(METHODS["lift"], filter_rank=1, interval=1)
    rule, optimizer = Rules(rules(model)), torch.optim.AdamW(model.parameters(), lr=0.1)
    rule.bind(optimizer)
    rule.start(model, steps=100)
    before = entries_of(model)
    for step in (1, 2):
        model(**task()[0]).loss.backward()
        optimizer.step()
        term = next(iter(moving_terms(model, "default").values()))
        old, moments = term.positions.clone(), optimizer.state[term.values]["exp_avg"].clone()
        rule.after_step(model, step)
        known = torch.isin(term.positions, old)
        stayed = torch.isin(old, term.positions)
        assert torch.equal(optimizer.state[term.values]["exp_avg"][known], moments[stayed])
        assert not optimizer.state[term.values]["exp_avg"][~known].any()
    assert any(not torch.equal(p, before[layer]) for layer, p in entries_of(model).items())
    alone = Rules(rules(model))
    alone.start(model, steps=100)
    alone.after_step(model, 3)


# beside other things


@pytest.mark.parametrize("name", ["paca", "lift", "sft"])
def test_on_a_quantised_base_the_change_alone_is_trained(name: str) -> None:
    model = tiny_llama()
    for layer in model.model.layers[0].self_attn.named_children():
        if isinstance(layer[1], nn.Linear):
            base = NormalFloat.from_matrix(layer[1].weight.detach())
            setattr(model.model.layers[0].self_attn, layer[0], SumLinear({"base": base}))
    before = logits(model)
    adapt(model, name, RANK)
    assert torch.equal(logits(model), before)
    losses, _ = train(model, 8, lr=1e-2)
    assert min(losses[4:]) < losses[0] and not torch.equal(logits(model), before)
    assert torch.equal(logits(remove_adapter(model)), before)


@pytest.mark.parametrize("name", ["paca", "random-mask", "sft"])
@pytest.mark.parametrize("half", [False, True])
def test_lean_keeps_less_and_gives_the_same_gradients(name: str, half: bool) -> None:
    """What a norm or a gate gave is not kept for chosen entries, but made again."""
    kept, gradients = [], []
    for switch in (False, True):
        model = adapted(METHODS[name]).train()
        weft.lean(model, switch)
        assert not switch or not any("_proj" in layer for layer in lean_report(model).left)
        losses: list[Tensor] = []
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            kept.append(
                saved_bytes(lambda m=model, found=losses: found.append(m(**task()[0]).loss), model.parameters())
            )
        losses[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert kept[1] < 0.97 * kept[0]
    for key, gradient in gradients[0].items():
        tolerance = (0.05 if half else 1e-5) * float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][key], gradient, atol=tolerance, rtol=0)
