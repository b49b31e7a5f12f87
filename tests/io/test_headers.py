"""Damaged and foreign checkpoints: one sentence, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from weft.errors import WeftError

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(*_: Any, **__: Any) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", reads)


def refusal(directory: Path) -> str:
    with pytest.raises(WeftError) as caught:
        AutoModelForCausalLM.from_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_another_format(saved: Path) -> None:
    edit_config(saved, lambda c: c.update(format=2, weft="9.1"))
    assert "written by weft 9.1, has format 2" in refusal(saved)


def test_an_entry_of_the_future(saved: Path) -> None:
    edit_config(saved, lambda c: c.update(rotation="hadamard"))
    assert "has an entry 'rotation'" in refusal(saved)


def test_unknown_kind_of_term(saved: Path) -> None:
    edit_config(saved, lambda c: c["layers"][Q]["terms"]["low_rank"].update(kind="low_rang"))
    assert (
        f"layer {Q} cannot be built: There is no kind of term called 'low_rang'; the nearest are: low_rank"
        in refusal(saved)
    )


@pytest.mark.parametrize(
    "edit",
    [
        lambda spec: spec.pop("terms"),
        lambda spec: spec["terms"].clear(),
        lambda spec: spec.update(terms=3),
        lambda spec: spec["terms"]["low_rank"].pop("rank"),
        lambda spec: spec["terms"]["low_rank"].update(rank="three"),
        lambda spec: spec["terms"]["low_rank"].update(rank=-1),
        lambda spec: spec["terms"]["low_rank"].update(strange=1),
        lambda spec: spec["terms"]["low_rank"].update(in_features=31),
    ],
)
def test_malformed_spec(saved: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_config(saved, lambda c: edit(c["layers"][Q]))
    assert f"describes the layer {Q} wrongly" in refusal(saved)


def test_layer_of_another_shape(saved: Path) -> None:
    def widen(config: dict[str, Any]) -> None:
        for term in config["layers"][Q]["terms"].values():
            term["out_features"] = 40

    edit_config(saved, widen)
    assert f"layer {Q} is 40 x 32, and the model's is 32 x 32" in refusal(saved)


def test_layer_that_the_model_lacks(saved: Path) -> None:
    edit_config(saved, lambda c: c["layers"].update({"model.layers.7.mlp.up_proj": c["layers"][Q]}))
    assert "a sum of terms at model.layers.7.mlp.up_proj, where LlamaForCausalLM has no linear layer" in refusal(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(saved)
    assert "model.safetensors is missing, damaged or cut short" in message


def test_truncated_shard(model: LlamaForCausalLM, saved: Path) -> None:
    model.save_pretrained(saved, max_shard_size="30KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(saved.glob("model-*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert f"{shard.name} is missing, damaged or cut short" in refusal(saved)


def test_missing_shard(model: LlamaForCausalLM, saved: Path) -> None:
    model.save_pretrained(saved, max_shard_size="30KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(saved.glob("model-*"))[-1]
    shard.unlink()
    assert f"{shard.name} is missing, damaged or cut short" in refusal(saved)


@pytest.mark.parametrize("key", ["terms.low_rank.A", "terms.sparse.positions", "bias", "weight"])
def test_missing_tensor(saved: Path, key: str) -> None:
    edit_weights(saved, lambda tensors: tensors.pop(f"{Q}.{key}"))
    assert f"lacks the tensor {Q}.{key}:" in refusal(saved)


def test_tensor_of_another_shape(saved: Path) -> None:
    edit_weights(saved, lambda tensors: tensors.update({f"{Q}.terms.low_rank.A": torch.zeros(2, 32)}))
    assert f"{Q}.terms.low_rank.A has shape [2, 32], and its config.json says [3, 32]" in refusal(saved)


def test_unexpected_tensor(saved: Path) -> None:
    edit_weights(saved, lambda tensors: tensors.update({f"{Q}.terms.more.A": torch.zeros(2, 32)}))
    assert f"holds the tensor {Q}.terms.more.A, of which its config.json knows nothing" in refusal(saved)


def test_layer_forgotten_by_the_config(saved: Path) -> None:
    edit_config(saved, lambda c: c["layers"].pop(Q))
    assert f"holds the tensor {Q}.bias and 5 more, of which its config.json knows nothing" in refusal(saved)


def test_pickled_weights(model: LlamaForCausalLM, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    assert "read from safetensors files, not from" in refusal(saved)
