"""Mixing in output space: the mean of the passes, the single adapter, and where it equals a merge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.merging.cmlora import dominant
from weft.terms.adapters import adapters_of, find_adapter
from weft.testing_adapters import task, tiny_llama
from weft.verbs.mix import mix

IDS = task()[0]["input_ids"]


def moved(model: nn.Module, *names: str) -> nn.Module:
    for seed, name in enumerate(names):
        weft.adapt(model, "lora", 2, name=name)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in find_adapter(model, name).named_parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def alone(model: nn.Module, name: str) -> Tensor:
    weft.set_adapter(model, name)
    out: Tensor = model(IDS).logits
    return out


@torch.no_grad()
def test_it_is_the_mean_of_the_passes() -> None:
    model = moved(tiny_llama(), "a", "b")
    expected = 0.75 * alone(model, "a") + 0.25 * alone(model, "b")
    weft.set_adapter(model, ["a"])
    torch.testing.assert_close(mix(model, ["a", "b"], [3, 1])(IDS), expected)
    assert [name for name, adapter in adapters_of(model).items() if adapter.active] == ["a"]
    assert torch.equal(mix(model, ["a"])(IDS), alone(model, "a"))


@torch.no_grad()
def test_a_method_gives_the_weights() -> None:
    model = moved(tiny_llama(), "a", "b")
    expected = mix(model, ["a", "b"], dominant(2, 1))(IDS)
    assert torch.equal(weft.mix(model, ["a", "b"], method="cmlora", which=1)(IDS), expected)
    for given, sentence in (
        ({"method": "cmlor"}, "There is no method to mix called 'cmlor'; the nearest are: cmlora"),
        ({"method": "linear"}, "There is no method to mix called 'linear'"),
        ({"method": "cmlora", "which": 2}, "There is no adapter 2 among 2"),
        ({"method": "cmlora", "first": 2}, "'cmlora' has no option 'first'; its options are: which, strength"),
        ({"method": "cmlora", "weights": [1, 1]}, "not both"),
        ({"which": 1}, "Give either weights= or a method="),
    ):
        with pytest.raises(WeftError, match=sentence):
            mix(model, ["a", "b"], **given)


@torch.no_grad()
def test_identical_adapters_are_one() -> None:
    model = tiny_llama()
    for name in ("a", "b", "c"):
        moved(model, name)
    single = alone(model, "a")
    torch.testing.assert_close(mix(model, ["a", "b", "c"], dominant(3))(IDS), single, atol=1e-6, rtol=1e-5)


class Linear(nn.Module):
    """One layer and nothing else, whose output is called logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(x))


@torch.no_grad()
def test_for_a_linear_model_it_equals_the_merge_and_for_others_it_does_not(tmp_path: Any) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    for make, given, equal in ((Linear, x, True), (tiny_llama, IDS, False)):
        torch.manual_seed(0)
        model = moved(make(), "a", "b")
        mixed = mix(model, ["a", "b"], dominant(2))(given)
        place = tmp_path / make.__name__
        for name in "ab":
            weft.save_adapter(model, place / name, name)
            weft.remove_adapter(model, name)
        weft.load_adapter(model, weft.combine([place / "a", place / "b"], weights=[0.6, 0.4]))
        assert torch.allclose(model(given).logits, mixed, atol=1e-5) is equal


@pytest.mark.parametrize("count", range(1, 9))
def test_dominant_weights_sum_to_their_number(count: int) -> None:
    assert sum(dominant(count, count - 1)) == pytest.approx(count, rel=1e-12)
    assert dominant(count, strength=1.0) == [1.0] * count


def test_the_published_weights() -> None:
    assert dominant(2) == pytest.approx([1.2, 0.8])
    assert dominant(3, 1) == pytest.approx([0.667, 1.667, 0.667], abs=1e-3)
    assert dominant(5)[:2] == pytest.approx([2.647, 0.588], abs=1e-3)


def test_mistakes() -> None:
    model = moved(tiny_llama(), "a", "b")
    for names, weights, sentence in (
        (["a", "c"], None, "There is no adapter 'c'"),
        (["a", "b"], [1.0], "2 names and 1 weights"),
        (["a", "a"], None, "name each adapter once"),
        (["a", "b"], [1.0, -1.0], "no positive sum"),
    ):
        with pytest.raises(WeftError, match=sentence):
            mix(model, names, weights)
    with pytest.raises(WeftError, match="give 0 to 1"):
        dominant(2, 2)
