"""Whatever puts sums of terms into a model, `save_pretrained` writes a directory that opens with equal logits."""

from __future__ import annotations

import copy
import json
import pickle
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import weft
from weft.errors import WeftError
from weft.io.quantizer import WeftConfig
from weft.terms import Int8, LowRank, NormalFloat, SumLinear
from weft.terms.layers import linear_layers, replace, weight_of
from weft.terms.put import put

IDS = torch.arange(1, 17).view(2, 8)
BATCH = {"input_ids": IDS, "labels": IDS}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def own_loop(model: nn.Module) -> None:
    for name, layer in linear_layers(model, "*mlp*").items():
        put(model, name, {"code": Int8.from_matrix(weight_of(layer))})


def replaced(model: nn.Module) -> None:
    name = "model.layers.1.mlp.up_proj"
    replace(model, name, SumLinear({"code": NormalFloat.from_matrix(weight_of(model.get_submodule(name)))}))


def set_by_hand(model: nn.Module) -> None:
    """As people do who know only torch."""
    model.model.layers[0].mlp.up_proj = SumLinear({"a": LowRank.from_factors(torch.ones(48, 2), torch.ones(2, 32))})


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "adapt": lambda m: weft.adapt(m, "pissa", rank=2),
    "two adapters": lambda m: weft.adapt(weft.adapt(m, "lora", rank=2), "dora", rank=2, name="other"),
    "nf4": lambda m: weft.quantize(m, "nf4"),
    "int8": lambda m: weft.quantize(m, "int8"),
    "lq-lora": lambda m: weft.quantize(m, "lq-lora", rank=2),
    "compress": lambda m: weft.compress(m, "svd", budget=0.5),
    "codes under an adapter": lambda m: weft.adapt(weft.quantize(m, "nf4"), "lora", rank=2),
    "a loop of one's own": own_loop,
    "layers.replace": replaced,
    "torch alone": set_by_hand,
}


@pytest.fixture
def expected(dense: LlamaForCausalLM) -> Tensor:
    return logits(dense, IDS)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_saved(dense: LlamaForCausalLM, tmp_path: Path, way: str) -> None:
    WAYS[way](dense)
    dense.save_pretrained(tmp_path / "whole")
    dense.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    for directory in ("whole", "shards"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert torch.equal(logits(loaded, IDS), logits(dense, IDS)), directory


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_saved(dense: LlamaForCausalLM, tmp_path: Path, copied: Callable[[nn.Module], nn.Module]) -> None:
    own_loop(dense)
    twin = copied(dense)
    put(twin, "model.layers.0.self_attn.q_proj", {"a": LowRank.from_factors(torch.ones(32, 1), torch.ones(1, 32))})
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS), logits(twin, IDS))


def test_a_model_within_another_is_saved(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    """The base alone, and then the whole: each directory lists its own names."""
    own_loop(dense)
    dense.model.save_pretrained(tmp_path / "base")
    dense.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        inner = AutoModel.from_pretrained(tmp_path / "base")(input_ids=IDS).last_hidden_state
        assert torch.equal(inner, dense.model(input_ids=IDS).last_hidden_state)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), IDS), logits(dense, IDS))


def test_push_to_hub_goes_the_same_way(
    dense: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would upload, with the network taken away."""
    own_loop(dense)
    uploaded: dict[str, object] = {}

    def upload(self: object, directory: str, repo_id: str, *args: object, **kwargs: object) -> None:
        uploaded.update(json.loads((Path(directory) / "config.json").read_text()))

    hub = types.SimpleNamespace(create_repo=lambda *a, **k: types.SimpleNamespace(repo_id="me/mine"))
    card = types.SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: card)
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    dense.push_to_hub("me/mine")
    assert uploaded["quantization_config"]["layers"].keys() == {n for n in linear_layers(dense) if "mlp" in n}  # type: ignore[index]


def test_a_merged_or_freed_model_is_saved_as_a_plain_one(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    own_loop(dense)
    dense.save_pretrained(tmp_path / "sums")
    for name, layer in linear_layers(dense).items():
        if isinstance(layer, SumLinear):
            dense.set_submodule(name, layer.collapse())
    dense.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(loaded, IDS), logits(dense, IDS))


def test_a_plain_model_from_a_weft_config_is_plain(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    dense.config.quantization_config = WeftConfig().to_dict()
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_the_marks_of_another_tool_stay(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    """A model that another tool has quantised is saved as without weft; sums beside its layers are refused."""
    theirs = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    dense.config.quantization_config = theirs
    dense.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"] == theirs
    weft.adapt(dense, "lora", rank=2)
    with pytest.raises(WeftError, match=r"sums of terms \(model.layers.0.self_attn.q_proj\) beside .* bitsandbytes"):
        dense.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()
    weft.remove_adapter(dense)
    assert dense.config.quantization_config == theirs


def test_flash_attention_is_told(dense: LlamaForCausalLM) -> None:
    """It asks an nn.Linear for its dtype where the config does not say that there may be none."""
    from transformers.integrations.flash_attention import get_target_dtype

    dense.config.dtype = torch.bfloat16  # as from_pretrained does
    attention = dense.model.layers[0].self_attn
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = attention.get_submodule(part)
        put(dense, f"model.layers.0.self_attn.{part}", {"code": Int8.from_matrix(weight_of(layer))})
    assert get_target_dtype(torch.zeros(1), attention) == torch.bfloat16
