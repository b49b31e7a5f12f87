"""Bases that another tool has quantised: what can be trained on them can be saved and merged, or is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.testing_adapters import task, tiny_llama, train

Q = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(task()[0]["input_ids"]).logits
    return out


class Doubled(Tensor):
    """A stand-in for a weight in codes: what it stores is not what it means."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor) / 2


class Unreadable(Tensor):
    def dequantize(self) -> Tensor:
        raise NotImplementedError("no numbers here")


def with_weight(kind: type[Tensor], factor: float) -> Any:
    model = tiny_llama()
    layer = model.get_submodule(Q)
    layer.weight = nn.Parameter((factor * layer.weight.detach()).as_subclass(kind), requires_grad=False)
    return model


def test_what_a_weight_means_is_what_is_merged_and_sampled(tmp_path: Path) -> None:
    plain, coded = (weft.adapt(make(), "lora", 2) for make in (tiny_llama, lambda: with_weight(Doubled, 2.0)))
    for model, name in ((plain, "plain"), (coded, "coded")):
        for parameter in weft.trainable(model).parameters.values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        weft.save_adapter(model, tmp_path / name)
        weft.merge_adapter(model)
    assert (tmp_path / "plain" / "weft_adapter.json").read_text() == (
        tmp_path / "coded" / "weft_adapter.json"
    ).read_text()
    assert torch.equal(logits(coded), logits(plain))


def test_a_weight_that_cannot_be_read_is_refused_before_training() -> None:
    model = with_weight(Unreadable, 1.0)
    with pytest.raises(
        WeftError, match=r"q_proj is a .*Unreadable, whose numbers weft cannot read \(no numbers here\)"
    ):
        weft.adapt(model, "lora", 2)
    assert type(model.get_submodule(Q)) is nn.Linear


@pytest.mark.parametrize("codes", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_an_adapter_on_a_torchao_model_is_saved_and_merged(codes: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def quantised() -> Any:
        model = tiny_llama()
        torchao.quantize_(model.model, getattr(torchao, codes)())
        return model

    model = weft.adapt(quantised(), "lora", 2)
    train(model, 3)
    moved = logits(model)
    weft.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(weft.load_adapter(quantised(), tmp_path / "adapter")), moved)
    weft.merge_adapter(model)
    torch.testing.assert_close(logits(model), moved, atol=1e-4, rtol=0)


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: a linear layer whose weight is no matrix."""


def test_layers_of_another_tool_are_named() -> None:
    model = tiny_llama()
    for module in model.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear4bit
    with pytest.raises(WeftError, match=r"its layers are .*Linear4bit, whose weights another tool keeps in codes"):
        weft.adapt(model, "lora", 2)


def test_a_linear_layer_without_a_weight_is_none() -> None:
    """compressed-tensors keeps the class and takes the weight away."""
    model = tiny_llama()
    for module in model.model.modules():
        if type(module) is nn.Linear:
            del module.weight
    with pytest.raises(WeftError, match="its layers are torch.Linear"):
        weft.adapt(model, "lora", 2)
