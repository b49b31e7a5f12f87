"""Models whose weights accelerate keeps elsewhere: every verb gives the right values or refuses by the layer's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

import weft
from weft.errors import WeftError
from weft.terms import TERMS, Int8, SumLinear
from weft.terms.put import put
from weft.testing import example

logging.disable_progress_bar()
CPU = torch.device("cpu")
IDS = torch.arange(1, 17).view(2, 8)


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def by_map(place: str) -> Callable[[Path], nn.Module]:
    def load(root: Path) -> nn.Module:
        make().save_pretrained(root / "plain")
        names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        where = {**dict.fromkeys(names, "cpu"), "model.layers.1": place}
        return AutoModelForCausalLM.from_pretrained(root / "plain", device_map=where, offload_folder=root / "off")

    return load


OFFLOADED: dict[str, Callable[[Path], nn.Module]] = {
    "device_map disk": by_map("disk"),
    "cpu_offload": lambda root: accelerate.cpu_offload(make(), execution_device=CPU),
    "disk_offload": lambda root: accelerate.disk_offload(make(), str(root / "off"), execution_device=CPU),
    "block by block": lambda root: accelerate.cpu_offload(
        make(), execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"]
    ),
}
VERBS: dict[str, Callable[[nn.Module], object]] = {
    "lora": lambda m: weft.adapt(m, "lora", rank=2),
    "pissa": lambda m: weft.adapt(m, "pissa", rank=2),
    "nf4": lambda m: weft.quantize(m, "nf4"),
    "svd": lambda m: weft.compress(m, "svd", budget=0.5),
    "named": lambda m: weft.adapt(m, "lora", rank=2, targets="*layers.1.mlp*"),
    "put": lambda m: put(m, "model.layers.1.mlp.up_proj", {"code": Int8(32, 48)}),
}


@pytest.mark.parametrize("way", OFFLOADED)
def test_offloaded_layers_are_refused_by_name(tmp_path: Path, way: str) -> None:
    model = OFFLOADED[way](tmp_path)
    expected = logits(model)
    torch.testing.assert_close(expected, logits(make()))
    for name, verb in VERBS.items():
        with pytest.raises(WeftError, match=r"The weights of model.layers.[01].* are offloaded to the disk or the CPU"):
            verb(model)
        assert not any(isinstance(m, SumLinear) for m in model.modules()), name
        assert torch.equal(logits(model), expected), name


def test_an_adapter_is_not_loaded_on_offloaded_layers(tmp_path: Path) -> None:
    weft.save_adapter(weft.adapt(make(), "lora", rank=2), tmp_path / "adapter")
    model = accelerate.cpu_offload(make(), execution_device=CPU)
    with pytest.raises(WeftError, match="are offloaded"):
        weft.load_adapter(model, tmp_path / "adapter")


def test_layers_that_are_at_hand_take_adapters(tmp_path: Path) -> None:
    model = OFFLOADED["device_map disk"](tmp_path)
    expected = logits(model)
    weft.adapt(model, "pissa", rank=2, targets="*layers.0.*")
    torch.testing.assert_close(logits(model), expected)


def test_a_dispatched_model_keeps_its_hooks() -> None:
    model = accelerate.dispatch_model(make(), {"": "cpu"}, force_hooks=True)
    for layer in model.modules():
        if type(layer) is nn.Linear:
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(CPU))
    expected = logits(model)
    weft.adapt(model, "lora", rank=2)
    assert all("_hf_hook" in m.__dict__ for m in model.modules() if isinstance(m, SumLinear))
    torch.testing.assert_close(logits(model), expected)


def test_a_weft_model_is_not_merged_while_offloaded() -> None:
    model = accelerate.cpu_offload(weft.quantize(make(), "nf4"), execution_device=CPU, offload_buffers=True)
    with pytest.raises(WeftError, match="are offloaded"):
        weft.merge(model)


@pytest.mark.parametrize("kind", TERMS)
def test_every_term_computes_the_same_while_offloaded(kind: str) -> None:
    """Terms within terms are read where they lie, too: their tensors are fetched before."""
    model = nn.Sequential(SumLinear({"term": example(kind)}))
    x = torch.randn(3, model[0].in_features, generator=torch.Generator().manual_seed(0))
    linear = TERMS[kind].linear
    with torch.no_grad():
        expected, matrix = model(x), model[0].dense() if linear else None
        accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
        assert torch.equal(model(x), expected)
        assert not linear or torch.equal(model[0].dense(), matrix)
