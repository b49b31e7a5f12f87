"""Every registered graft against the shipped suite, a property a test."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import weft
from weft.errors import WeftError
from weft.grafts import GRAFTS
from weft.testing_grafts import PROPERTIES, check_graft, tiny_decoder

OPTIONS = {"lst": {"reduction": 4}}  # 8 does not divide heads of 8 into even ones


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("graft", GRAFTS.values(), ids=list(GRAFTS))
def test_property(graft: weft.grafts.Graft, name: str) -> None:
    assert name not in graft.exempt
    PROPERTIES[name](graft, MappingProxyType(OPTIONS.get(graft.name, {})))


def test_the_suite_sees_a_broken_graft() -> None:
    honest = GRAFTS["ntk-attention"]
    for name, broken in (
        ("start", {"deviates": ""}),
        ("count", {"count": lambda model, options: 1}),
        ("removal", {"disconnect": lambda model, before: None}),
        ("switches", {"disconnect": lambda model, before: None}),
        ("generates", {"connect": lambda model, modules: model.register_forward_hook(_stir)}),
    ):
        liar = dataclasses.replace(honest, name=f"liar-{name}", **broken)
        with pytest.raises(AssertionError):
            PROPERTIES[name](liar, {"std": 0.1})
        del GRAFTS[liar.name]
    with pytest.raises(AssertionError, match="liar: the property 'count' does not hold: 576 trained numbers"):
        check_graft(dataclasses.replace(honest, name="liar", count=lambda model, options: 1))
    del GRAFTS["liar"]


def _stir(module: torch.nn.Module, args: object, output: Any) -> None:
    """What a forward pass must not do: answer otherwise than a moment ago."""
    output.logits += torch.randn(output.logits.shape)


def test_what_only_adapters_have_is_refused() -> None:
    for given, sentence in (
        ({"rank": 4}, "takes no rank=; its own options are: std"),
        ({"targets": "q_proj"}, "takes no targets="),
        ({"name": "other"}, "takes no name="),
        ({"size": 3}, "has no option 'size'; its options are: std"),
    ):
        with pytest.raises(WeftError, match=sentence):
            weft.adapt(tiny_decoder(), "ntk-attention", **given)
    model = weft.adapt(tiny_decoder(), "ntk-attention")
    for call in (weft.merge_adapter, lambda m: weft.set_adapter(m, [])):
        with pytest.raises(WeftError, match="the graft 'ntk-attention' on this model, which stands alone"):
            call(model)
    with pytest.raises(WeftError, match="There is no graft|There is no adapter"):
        weft.remove_adapter(tiny_decoder())


def test_directories(tmp_path: Path) -> None:
    model = weft.adapt(tiny_decoder(), "ntk-attention")
    weft.save_adapter(model, tmp_path / "a")
    with pytest.raises(WeftError, match="not empty"):
        weft.save_adapter(model, tmp_path / "a")
    with pytest.raises(WeftError, match="which PEFT's format has no words for"):
        weft.save_adapter(model, tmp_path / "b", format="peft")
    assert not (tmp_path / "b").exists()
    other = tiny_decoder(blocks=1)
    with pytest.raises(WeftError, match="belongs to another model: model.layers.1.self_attn.weft_prefix.Z"):
        weft.load_adapter(other, tmp_path / "a")
    assert torch.equal(
        other.model.layers[0].mlp.up_proj.weight, tiny_decoder(blocks=1).model.layers[0].mlp.up_proj.weight
    )
    assert other.state_dict().keys() == tiny_decoder(blocks=1).state_dict().keys()
    changed = tiny_decoder()
    torch.nn.init.normal_(changed.model.layers[0].mlp.up_proj.weight)
    with pytest.warns(UserWarning, match="made on other weights than this model's"):
        weft.load_adapter(changed, tmp_path / "a")
    file = tmp_path / "a" / "weft_graft.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WeftError, match="cannot be read"):
        weft.load_adapter(tiny_decoder(), tmp_path / "a")


def test_a_model_directory_lacking_the_graft_s_tensors_is_refused(tmp_path: Path) -> None:
    weft.adapt(tiny_decoder(), "ntk-attention").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "weft_prefix" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(WeftError, match="The checkpoint lacks the tensor .*weft_prefix"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_without_weft_a_directory_is_refused(tmp_path: Path) -> None:
    """Plain transformers skips a quantization_config that it does not know; the shapes are what it stumbles on."""
    weft.adapt(tiny_decoder(), "ntk-attention").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config")["graft"]["name"] == "ntk-attention"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size|shape|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_old_functions_answer_with_a_sentence() -> None:
    with pytest.raises(WeftError, match="weft.verbs.lst.ladder is no more: weft.adapt"):
        from weft.verbs.lst import ladder  # noqa: F401
    with pytest.raises(WeftError, match="weft.verbs.ntk_attention.add_prefix is no more"):
        from weft.verbs.ntk_attention import add_prefix  # noqa: F401
