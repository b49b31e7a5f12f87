"""The adapters that train chosen columns or entries of a weight: each card's invariants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from weft.io.adapters import load_adapter, save_adapter
from weft.methods import METHODS
from weft.terms import Columns, Dense, SumLinear
from weft.terms.adapters import find_adapter
from weft.testing_adapters import RANK, adapted, task, tiny_llama, train
from weft.verbs.adapt import adapt, disable, merge_adapter, remove_adapter

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
