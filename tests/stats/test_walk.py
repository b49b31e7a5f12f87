"""The sequential walk against whole forward passes of the partly changed model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tests.stats.models import COMMON, batches, build, expected_mask, ids, inputs_and_outputs, kept
from weft.errors import WeftError
from weft.stats.calibrate import forward_inputs, to_device
from weft.stats.collect import Collector
from weft.stats.walk import Group, _positional_hidden, walk
from weft.terms import LowRank
from weft.terms.layers import linear_layers, weight_of
from weft.terms.put import put

ARCHITECTURES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "bert", "t5", "vit")
NEEDS = ("input_moment", "input_mean", "input_abs_mean")


def shrink(model: nn.Module, name: str) -> None:
    """What a caller does between two groups: replace the layer, here by its leading two components."""
    layer = model.get_submodule(name)
    U, s, V = torch.linalg.svd(weight_of(layer), full_matrices=False)
    put(model, name, {"low_rank": LowRank.from_factors(U[:, :2] * s[:2], V[:2])}, layer.bias)


def inputs(name: str, model: nn.Module, data: Sequence[Any], layers: Sequence[str]) -> dict[str, Tensor]:
    """The kept tokens that each layer is fed in plain passes of the whole model, (tokens, in) in fp64."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for batch in data:
        with torch.no_grad():
            seen, _ = inputs_and_outputs(model, forward_inputs(model, to_device(batch, model)), layers)
        for layer in layers:
            found[layer].append(kept(seen[layer][0][0], expected_mask(name, layer, batch)))
    return {layer: torch.cat(rows) for layer, rows in found.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_are_those_of_the_partly_changed_model(name: str) -> None:
    model, data = build(name), batches(name)
    layers = list(linear_layers(model))
    dense = inputs(name, model, data, layers)
    seen: list[str] = []
    for group in walk(model, data, layers, NEEDS, original=True):
        for member, x in inputs(name, model, data, group.names).items():
            x_o = dense[member]
            expected = {
                "input_moment": x.mT @ x / len(x),
                "input_mean": x.mean(0),
                "input_abs_mean": x.abs().mean(0),
                "cross_moment": x_o.mT @ x / len(x),
            }
            assert group.moments.keys() == expected.keys()
            for need, value in expected.items():
                torch.testing.assert_close(group.moments[need], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
        for member in group.names:
            shrink(model, member)
        seen += group.names
    assert sorted(seen) == sorted(layers)


def test_groups_are_layers_fed_one_tensor_in_the_order_of_the_model() -> None:
    model = build("t5")
    groups = [[n.rsplit(".", 1)[1] for n in g.names] for g in walk(model, batches("t5"), list(linear_layers(model)))]
    encoder = [["q", "k", "v"], ["o"], ["wi"], ["wo"]]
    decoder = [["q", "k", "v"], ["o"], ["q"], ["k", "v"], ["o"], ["wi"], ["wo"]]
    assert groups == encoder * 2 + decoder * 2


def test_layers_outside_blocks_come_last_in_the_changed_model() -> None:
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**COMMON)).eval()
    data = [{"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}]
    groups: list[Group] = []
    for group in walk(model, data, list(linear_layers(model))):
        if group.block == "":
            x = inputs("bert", model, data, group.names)["bert.pooler.dense"]
            torch.testing.assert_close(group.moments["input_moment"], x.mT @ x / len(x), rtol=1e-5, atol=1e-7)
        groups.append(group)
        for member in group.names:
            shrink(model, member)
    assert groups[-1].names == ["bert.pooler.dense"] and len({g.block for g in groups}) == 3


def test_finished_blocks_are_passed_through() -> None:
    """As after an interruption: `done` puts the first block's factors back, and the second sees their outputs."""
    model, data = build("llama"), batches("llama")
    layers = list(linear_layers(model))
    expected = []
    for group in walk(model, data, layers, original=True):
        if group.block.endswith(".1"):
            expected.append(group)
        for member in group.names:
            shrink(model, member)

    again = build("llama")

    def done(block: str) -> bool:
        if not block.endswith(".0"):
            return False
        for member in layers[:7]:
            shrink(again, member)
        return True

    found = []
    for group in walk(again, data, layers, original=True, done=done):
        found.append(group)
        for member in group.names:
            shrink(again, member)
    assert [group.names for group in found] == [group.names for group in expected]
    for one, other in zip(found, expected, strict=True):
        for need in one.moments:
            assert torch.equal(one.moments[need], other.moments[need])


@pytest.mark.parametrize("original", [False, True])
def test_never_more_than_one_blocks_moments_are_alive(original: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, "num_hidden_layers": 3})).eval()
    block = 8 * (3 * 16 * 16 + 24 * 24) * (2 if original else 1)  # q k v; o; gate up; down
    made: list[weakref.ref[Tensor]] = []
    most = 0
    finish = Collector.moments

    def alive() -> int:
        return sum(tensor.nbytes for tensor in (ref() for ref in made) if tensor is not None)

    def watched(self: Collector) -> Any:
        nonlocal most
        most = max(most, alive() + self.nbytes * (2 if original else 1))
        return finish(self)

    monkeypatch.setattr(Collector, "moments", watched)
    groups = 0
    for group in walk(model, [{"input_ids": ids(1, 6)}], list(linear_layers(model)), original=original):
        groups += 1
        made += [weakref.ref(tensor) for tensor in group.moments.values()]
        most = max(most, alive())
    assert groups == 12
    assert 8 * 24 * 24 <= most <= block


@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = build("llama").train()
    before = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    try:
        for _ in walk(model, batches("llama"), list(linear_layers(model))):
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    gc.collect()
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_one_block_applied_often_is_refused() -> None:
    model = build("albert")
    with pytest.raises(WeftError, match="The blocks of albert.encoder.albert_layer_groups are no chain"):
        list(walk(model, batches("albert"), list(linear_layers(model))))


class Skipping(nn.Module):
    """Something happens between its two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](2 * self.blocks[0](x))


def test_blocks_with_something_between_them_are_refused() -> None:
    model = Skipping()
    with pytest.raises(WeftError, match="The blocks of blocks are no chain.*without the sequential form"):
        list(walk(model, [{"x": torch.ones(1, 2, 4)}], list(linear_layers(model))))


class Twice(nn.Module):
    """A block that applies one layer twice and another never."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.uses, self.layer, self.other = uses, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.uses):
            x = self.layer(x)
        return self.other(x)


class Stack(nn.Module):
    def __init__(self, uses: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Twice(uses)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize("uses", [0, 2])
def test_a_layer_used_twice_or_never_in_its_block_is_refused(uses: int) -> None:
    model = Stack(uses)
    with pytest.raises(WeftError, match=f"The block blocks.0 applies its layer layer {uses} times in a pass"):
        list(walk(model, [{"x": torch.ones(1, 2, 4)}], list(linear_layers(model))))


def test_dead_and_nan_layers_are_named() -> None:
    model, data = build("llama"), batches("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(WeftError, match=r"layer model.layers.1.mlp.down_proj holds NaN"):
        list(walk(model, data, list(linear_layers(model))))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_call_that_is_repeated_has_no_cache_by_whatever_name(name: str) -> None:
    x = torch.ones(1, 2, 3)
    args, kwargs = _positional_hidden((), {"hidden_states": x, name: DynamicCache(), "use_cache": True, "other": None})
    assert args == (x,) and kwargs == {"other": None}
