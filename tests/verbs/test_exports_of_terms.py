"""Every structure in every format: exact, or refused in a sentence that names the layer, before anything is written."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import weft
from weft.errors import WeftError
from weft.io.formats import FORMATS
from weft.io.formats.packing import unpack
from weft.terms import IntegerCode, RoundedInputs, Term
from weft.terms.coded_embedding import code_embeddings
from weft.terms.layers import linear_layers, weight_of
from weft.terms.put import put
from weft.testing_examples import EXAMPLES, example

IDS = torch.arange(12).view(2, 6)
LAYER = "model.layers.0.mlp.gate_proj"
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def sized(inn: int = 64, out: int = 96, kind: Any = LlamaForCausalLM, config: Any = LlamaConfig) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": inn, "intermediate_size": out, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return kind(config(**sizes, **heads, tie_word_embeddings=False)).eval()


def holding(term: Term) -> Any:
    """A Llama with the term in the place of its gate."""
    model = sized(term.in_features, term.out_features)
    put(model, LAYER, {"base": term.eval()}, None)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits.float()
    return found


def packed(path: Path) -> Tensor:
    """The gate (out, in) of a directory of compressed-tensors in integers, or in float8 with a scale a row."""
    tensors = {key.removeprefix(f"{LAYER}."): t for key, t in load_file(path / "model.safetensors").items()}
    if "weight_packed" not in tensors:
        assert tensors["weight"].dtype == torch.float8_e4m3fn
        return tensors["weight"].float() * tensors["weight_scale"].float()
    (out, inn), scales = tensors["weight_shape"].tolist(), tensors["weight_scale"]
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    bits = said["config_groups"]["group_0"]["weights"]["num_bits"]
    zeros: Tensor | float = 2.0 ** (bits - 1)
    if "weight_zero_point" in tensors:
        zeros = (
            unpack(tensors["weight_zero_point"].T.contiguous(), bits, out)
            .T.float()
            .repeat_interleave(inn // scales.shape[1], 1)
        )
    codes = unpack(tensors["weight_packed"], bits, inn).float()
    return (codes - zeros) * scales.repeat_interleave(inn // scales.shape[1], 1)


@pytest.mark.parametrize("format", [name for name, format in FORMATS.items() if format.package is None])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_structure_is_exact_or_refused(kind: str, format: str, tmp_path: Path) -> None:
    model = holding(example(kind))
    before, tensors = logits(model), copy.deepcopy(model.state_dict())
    try:
        weft.export(model, tmp_path / "out", format)
    except WeftError as error:
        said = str(error)
        assert not list(tmp_path.iterdir()) and LAYER in said and "\n" not in said
        assert ("--format hf" in said) == example(kind).linear, "it is sent to where it is refused too"
        assert format != "hf" or not example(kind).linear
    else:
        if format == "hf":
            torch.testing.assert_close(
                logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), before, **TOLERANCE
            )
        else:
            assert torch.equal(packed(tmp_path / "out"), model.get_submodule(LAYER).dense())
    after = model.state_dict()
    assert after.keys() == tensors.keys() and all(torch.equal(t, after[name]) for name, t in tensors.items())


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if not example(kind).linear])
def test_what_is_no_matrix_is_not_merged_and_stays_as_it_was(kind: str) -> None:
    """The layer before it in the model is not merged either."""
    model = holding(example(kind))
    put(model, "model.layers.0.self_attn.q_proj", {"base": IntegerCode.from_matrix(torch.randn(16, 8), 8, 8)})
    code_embeddings(model)
    before, names = logits(model), set(model.state_dict())
    with pytest.raises(WeftError, match=f"{LAYER}: .* is no matrix"):
        weft.merge(model)
    assert torch.equal(logits(model), before) and set(model.state_dict()) == names, "codes of tables too"


def test_codes_behind_rounded_inputs_are_no_codes_of_a_format(tmp_path: Path) -> None:
    """Beside plain codes, which are."""
    model = sized()
    for name, layer in linear_layers(model).items():
        code = IntegerCode.from_matrix(weight_of(layer), 8, 64, symmetric=True)
        put(model, name, {"base": RoundedInputs.of(code) if name == LAYER else code})
    for format in ("compressed-tensors", "gptq", "hf"):
        with pytest.raises(WeftError, match=f"{LAYER}: a layer that rounds its inputs is no matrix"):
            weft.export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def biased(model: Any, only: str = "*") -> Any:
    """The model with layers whose compression gave them a bias."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in linear_layers(model, only).items():
        code = IntegerCode.from_matrix(weight_of(layer), 8, 32, symmetric=True, scale_dtype=torch.float32)
        put(model, name, {"base": code}, torch.randn(len(weight_of(layer)), generator=generator))
    return model


@pytest.mark.parametrize("only", ["*", "*.k_proj", "*.up_proj"])
def test_biases_that_a_layer_has_gained_are_kept(only: str, tmp_path: Path) -> None:
    """By merge, and by export, which leaves the model as it is."""
    model = biased(sized(), only)
    before = logits(model)
    weft.export(model, tmp_path / "hf", "hf")
    weft.export(model, tmp_path / "coded", "compressed-tensors")
    assert torch.equal(logits(model), before) and not (model.config.attention_bias or model.config.mlp_bias)
    assert [name for name, p in model.named_parameters() if name.endswith("bias")] == [
        f"{name}.bias" for name in linear_layers(model, only)
    ]
    weft.merge(model).save_pretrained(tmp_path / "merged")
    assert model.config.attention_bias == (only != "*.up_proj") and model.config.mlp_bias == (only != "*.k_proj")
    for place in ("hf", "merged"):
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        torch.testing.assert_close(logits(opened), before, **TOLERANCE)
    stored = load_file(tmp_path / "coded" / "model.safetensors")
    assert {name for name in stored if name.endswith("bias")} == {
        name for name in model.state_dict() if name.endswith("bias")
    }
    with pytest.raises(WeftError, match="biases that its kind mostly lacks"):
        FORMATS["gguf"].check("LlamaForCausalLM", model.config)


@pytest.mark.parametrize("targets", ["all-linear", "up_proj"])
def test_biases_are_kept_where_an_adapter_is_folded_in(targets: str, tmp_path: Path) -> None:
    """Some of the layers become plain; the others keep their biases as they are."""
    model = weft.adapt(biased(sized()), "lora", 2, targets=targets)
    before = logits(model)
    weft.merge_adapter(model)
    torch.testing.assert_close(logits(model), before, **TOLERANCE)
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), before, **TOLERANCE)


def test_biases_without_a_place_are_refused(tmp_path: Path) -> None:
    model = biased(sized(kind=MistralForCausalLM, config=MistralConfig))
    before = logits(model)
    words = re.escape("down_proj has got a bias, for which a plain MistralForCausalLM has no place; compress without")
    for format in ("hf", "compressed-tensors"):
        with pytest.raises(WeftError, match=words):
            weft.export(model, tmp_path / "out", format)
    with pytest.raises(WeftError, match=words):
        weft.merge(model)
    with pytest.raises(WeftError, match="has no place"):
        weft.merge_adapter(weft.adapt(model, "lora", 2, targets="up_proj"))
    assert torch.equal(logits(model), before) and not list(tmp_path.iterdir())


def test_biases_that_were_there_ask_for_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=40, n_positions=16)).eval()
    weft.quantize(model, "int8")
    before = logits(model)
    weft.export(model, tmp_path / "out", "hf")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), before, **TOLERANCE)


@pytest.mark.parametrize("widths, words", [((4, 4), "dequantize=True"), ((4, 8), "symmetric codes, or one width")])
def test_what_a_reader_gets_wrong_is_said(
    widths: tuple[int, int], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zero points in compressed-tensors; symmetric codes are read by everything."""
    for symmetric in (True, False):
        model, place = sized(), tmp_path / str(symmetric)
        for name, layer in linear_layers(model).items():
            bits = widths["mlp" in name]
            put(model, name, {"base": IntegerCode.from_matrix(weight_of(layer), bits, 32, symmetric=symmetric)})
        weft.export(model, place, "compressed-tensors", dtype=torch.float32)
        said, card = capsys.readouterr().err, (place / "README.md").read_text()
        assert (words in said and words in card) == (not symmetric)
