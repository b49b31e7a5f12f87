"""Adapters on disk: whole or not at all, bit for bit, and one clear sentence for what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.io import adapter_files as io
from weft.terms import LowRank
from weft.terms.adapters import Adapter, adapters_of, attach, find_adapter
from weft.testing_adapters import task, tiny_gpt2, tiny_llama
from weft.verbs.adapt import adapt

Q, K = (f"model.layers.0.self_attn.{n}_proj" for n in "qk")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(task()[0]["input_ids"]).logits
    return out


def moved(method: str = "pissa", **options: object) -> nn.Module:
    model = adapt(tiny_llama(), method, 2, **options)
    for _, parameter in find_adapter(model).named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(
    ("method", "options", "files"),
    [
        # PEFT's tensors are the adapter itself: no second copy of them
        ("lora", {}, ["adapter_config.json", "adapter_model.safetensors", "weft_adapter.json"]),
        (
            "lora",
            {"alpha": 3.0},
            ["adapter_config.json", "adapter_model.safetensors", "weft_adapter.json", "weft_adapter.safetensors"],
        ),
        (
            "pissa",
            {},
            ["adapter_config.json", "adapter_model.safetensors", "weft_adapter.json", "weft_adapter.safetensors"],
        ),
    ],
)
def test_what_is_written(method: str, options: dict[str, float], files: list[str], tmp_path: Path) -> None:
    model = moved(method, **options)
    weft.save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == files
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    again = weft.load_adapter(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model)) and find_adapter(again).method == method


def test_saved_twice_is_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        weft.save_adapter(moved(), tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert first == second


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(WeftError, match="is not empty"):
        weft.save_adapter(moved(), tmp_path / "full")

    def broken(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(io, "save_file", broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        weft.save_adapter(moved(), tmp_path / "empty", format="weft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"] and not any((tmp_path / "empty").iterdir())


def test_what_is_no_lora_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = tiny_gpt2()
    adapt(model, "soma", 2)
    with pytest.raises(WeftError, match="it trains parameters of the model itself too"):
        weft.save_adapter(model, tmp_path / "a", format="peft")
    weft.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()


def test_values_trained_along_come_back(tmp_path: Path) -> None:
    model = adapt(tiny_gpt2(), "soma", 2)
    bias = "transformer.h.0.mlp.c_fc.bias"
    model.get_parameter(bias).data += 1
    weft.save_adapter(model, tmp_path / "active")
    weft.set_adapter(model, [])
    weft.save_adapter(model, tmp_path / "aside")
    for name in ("active", "aside"):
        again = weft.load_adapter(tiny_gpt2(), tmp_path / name)
        assert torch.equal(again.get_parameter(bias), tiny_gpt2().get_parameter(bias) + 1)
        assert again.get_parameter(bias).requires_grad
        assert torch.equal(weft.remove_adapter(again).get_parameter(bias), tiny_gpt2().get_parameter(bias))


def test_shared_tensors_are_saved_once_and_shared_again(tmp_path: Path) -> None:
    model, shared = tiny_llama(), nn.Parameter(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    terms = {}
    for layer in (Q, K):
        term = LowRank(16, 16, 2)
        term.A = shared
        nn.init.constant_(term.B, 0.1)
        terms[layer] = {"pool": term}
    attach(model, Adapter("pool", "lora", terms))
    assert weft.trainable(model).count == 2 * 16 + 2 * 2 * 16
    weft.save_adapter(model, tmp_path / "adapter", format="weft")
    assert len(load_file(tmp_path / "adapter" / "weft_adapter.safetensors")) == 3
    again = weft.load_adapter(tiny_llama(), tmp_path / "adapter")
    assert find_adapter(again).terms[Q]["pool"].A is find_adapter(again).terms[K]["pool"].A
    assert torch.equal(logits(again), logits(model))


def test_several_roles_keep_their_names(tmp_path: Path) -> None:
    model = tiny_llama()
    terms = {"mine": LowRank(16, 16, 2), "mine_start": LowRank(16, 16, 3, scale=-1.0)}
    for term in terms.values():
        for parameter in term.parameters():
            nn.init.normal_(parameter)
    attach(model, Adapter("mine", "lora", {Q: terms}))
    weft.save_adapter(model, tmp_path / "a")
    again = weft.load_adapter(tiny_llama(), tmp_path / "a", name="yours")
    assert list(again.get_submodule(Q).terms) == ["base", "yours", "yours_start"]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "cut", "json", "format", "kind"])
def test_a_damaged_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    weft.save_adapter(moved(), tmp_path / "a")
    tensors, config = tmp_path / "a" / "weft_adapter.safetensors", tmp_path / "a" / "weft_adapter.json"
    state, said = load_file(tensors), json.loads(config.read_text())
    first = min(state)
    if damage == "missing":
        del state[first]
    elif damage == "unexpected":
        state["strange"] = torch.zeros(1)
    elif damage == "shape":
        state[first] = state[first][:1]
    elif damage == "format":
        said["format"] = 99
    elif damage == "kind":
        said["layers"][Q]["main"]["spec"]["kind"] = "shiftd"
    save_file(state, tensors)
    config.write_text(json.dumps(said))
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    if damage == "json":
        config.write_text(config.read_text()[:-100])
    model = tiny_llama()
    with pytest.raises(WeftError, match="cannot be read") as caught:
        weft.load_adapter(model, tmp_path / "a")
    assert "\n" not in str(caught.value) and not adapters_of(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny_llama().modules()]


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    weft.save_adapter(moved(), tmp_path / "a")
    with pytest.raises(WeftError, match="belongs to a layer"):
        weft.load_adapter(tiny_gpt2(), tmp_path / "a")
    with pytest.raises(WeftError, match="holds no adapter"):
        weft.load_adapter(tiny_llama(), tmp_path)
