"""Exports, each opened by the format's own library where it is installed: `pip install 'weft[integrations]'`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import weft
from tests.verbs.test_export import LAYER, SIZES, coded, logits, tiny
from weft.cli import app
from weft.errors import WeftError
from weft.runs.loading import load_model, load_tokenizer
from weft.verbs.export import run

QWENS = ("qwen2", "qwen3")
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def small(kind: str) -> Any:
    """A model of that type in fp32."""
    sizes = {key: value for key, value in tiny().config.to_dict().items() if key in SIZES}
    config = AutoConfig.for_model(kind, **sizes, head_dim=128 if kind == "qwen3" else 16, tie_word_embeddings=False)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("bits, group, symmetric", [(4, 32, True), (4, 32, False), (8, 32, True), (3, 32, False)])
def test_compressed_tensors_opens_its_format(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    """The tensors are those that the library's own compressor makes of the same numbers, bit for bit.

    Zero points are opened by `dequantize=True`: as they are, transformers 5.23 with compressed-tensors 0.20 expects
    them unpacked, and finds another shape in the library's own files too.
    """
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import CompressedTensorsConfig

    model = coded(tiny(), bits, group, symmetric)
    weft.export(model, tmp_path / "out", "compressed-tensors")
    how = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how)
    torch.testing.assert_close(logits(again), logits(model), **TOLERANCE)

    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(said).config_groups.values()
    stored, codes = (
        load_file(tmp_path / "out/model.safetensors"),
        model.get_submodule(LAYER).terms["code"].exact_codes(),
    )
    zeros = codes.zeros.to(torch.int8) - 2 ** (bits - 1)
    given = {"weight": codes.dense(), "weight_scale": codes.scales, "weight_zero_point": zeros}
    made = PackedQuantizationCompressor.compress(given, scheme)
    assert made.keys() == {key.removeprefix(f"{LAYER}.") for key in stored if key.startswith(LAYER)}
    assert all(torch.equal(tensor, stored[f"{LAYER}.{name}"]) for name, tensor in made.items())


def test_compressed_tensors_of_several_widths_and_a_scale_a_row(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    model = weft.quantize(coded(tiny(), 4, only="*self_attn*"), "int8", targets=["up_proj", "gate_proj"])
    weft.export(model, tmp_path / "out", "compressed-tensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    QuantizationConfig.model_validate(again.config.quantization_config.to_dict())
    torch.testing.assert_close(logits(again), logits(model), **TOLERANCE)


@pytest.mark.parametrize("scheme", ["fp8", "mxfp8", "mxfp6", "mxfp4"])
def test_compressed_tensors_opens_floating_point_codes(scheme: str, tmp_path: Path) -> None:
    """Its weights are ours, bit for bit."""
    pytest.importorskip("compressed_tensors")
    model = tiny(torch.bfloat16)
    weft.compress(model, [(scheme, {"scale": "bfloat16"} if scheme == "fp8" else {})])
    weft.export(model, tmp_path / "out", "compressed-tensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    found = logits(again)  # which decompresses
    torch.testing.assert_close(found, logits(model), atol=2e-2, rtol=2e-2)
    weight = again.get_submodule(LAYER).weight
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, model.get_submodule(LAYER).dense(torch.bfloat16))


def test_compensation_beside_codes_is_added_by_peft(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    peft = pytest.importorskip("peft")
    model = coded(tiny(), rank=3)
    weft.export(model, tmp_path / "out", "compressed-tensors")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    alone = logits(base)
    both = logits(peft.PeftModel.from_pretrained(base, tmp_path / "out/peft"))
    assert (both - alone).abs().max() > 0.01
    torch.testing.assert_close(both, logits(model), **TOLERANCE)


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (3, True), (8, True), (2, False)])
def test_gptqmodel_reads_its_layout(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """GPTQModel's own module and its conversion of the first format, to the last bit of fp16."""
    layers = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    model = coded(tiny(torch.float16), bits, 32, symmetric)
    weft.export(model, tmp_path / "out", "gptq")
    stored = load_file(tmp_path / "out/model.safetensors")
    layer = layers.TorchLinear(
        bits=bits, group_size=32, sym=symmetric, desc_act=False, in_features=96, out_features=64, register_buffers=True
    )
    own = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in stored.items() if name.startswith(LAYER)}
    layer.load_state_dict(own, strict=False)
    if symmetric:
        convert_gptq_v1_to_v2_format_module(module=layer, bits=bits, pack_dtype=torch.int32)
    layer.post_init()
    assert torch.equal(layer.dequantize_weight().T, model.get_submodule(LAYER).dense(torch.float16))


@pytest.mark.parametrize(
    "bits, group, symmetric, block",
    [
        (4, 32, True, "Q4_0"),
        (3, 64, False, "Q4_0"),
        (4, 32, False, "Q5_0"),
        (6, 32, True, "Q8_0"),
        (8, 32, True, "Q8_0"),
    ],
)
def test_gguf_is_read_by_its_own_reader_and_by_transformers(
    bits: int, group: int, symmetric: bool, block: str, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    model = coded(tiny(intermediate_size=128), bits, group, symmetric)
    weft.export(model, tmp_path / "out", "gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    down = found["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == block and found["output_norm.weight"].tensor_type.name == "F32"
    W = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(W, model.get_submodule(LAYER).dense(torch.float32))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    torch.testing.assert_close(logits(again), logits(model), **TOLERANCE)


def test_gguf_has_factors_beside_codes_in_a_second_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """llama.cpp reads no files of PEFT's: what it is told to open is the whole model."""
    gguf = pytest.importorskip("gguf")
    model = coded(tiny(), rank=3)
    done = weft.export(model, tmp_path / "out", "gguf")
    assert (done["coded"], done["adapter"]) == (7, 7) and not (tmp_path / "out/peft").exists()
    assert done["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.gguf"))
    assert "7 layers have factors beside their codes" in capsys.readouterr().err
    assert "-m model.gguf --lora adapter.gguf" in (tmp_path / "out/README.md").read_text()
    codes, factors = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"out/{file}.gguf").tensors}
        for file in ("model", "adapter")
    )
    down = codes["blk.0.ffn_down.weight"]
    B, A = (torch.from_numpy(factors[f"blk.0.ffn_down.weight.lora_{side}"].data.copy()) for side in "ba")
    W = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type)) + B @ A
    torch.testing.assert_close(W, model.get_submodule(LAYER).dense(torch.float32))
    weft.adapt(model := coded(tiny()), "dora", 2)
    assert weft.export(model, tmp_path / "dora", "gguf")["dense"] == 7
    assert "Written dense, since gguf does not have their codes (" in capsys.readouterr().err, "nor those within DoRA"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_lora_is_read_by_ggufs_reader(kind: str, tmp_path: Path) -> None:
    """B A, with the rows of queries and keys where the base's file has them, is what the adapter adds to the weight."""
    gguf = pytest.importorskip("gguf")
    model = weft.adapt(small(kind), "lora", 2, alpha=6)
    for parameter in weft.trainable(model).parameters.values():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    weft.export(model, tmp_path / "lora", "gguf-lora")
    read = gguf.GGUFReader(tmp_path / "lora/adapter.gguf")
    said = {name: read.fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert list(said.values()) == ["adapter", "lora", 0.0]
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    with weft.disable(model):
        weft.export(model, tmp_path / "base", "gguf", dtype=torch.float32)
    weft.export(model, tmp_path / "both", "gguf", dtype=torch.float32)
    base, both = (
        {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / place).tensors}
        for place in ("base/model.gguf", "both/model.gguf")
    )
    assert found.keys() == {
        f"{name}.lora_{side}" for name in base if not torch.equal(base[name], both[name]) for side in "ab"
    }
    assert any("attn_q" in name for name in found)
    for name in {name.rpartition(".")[0] for name in found}:
        added = found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
        torch.testing.assert_close(base[name] + added, both[name], atol=1e-5, rtol=1e-5)


def test_what_no_lora_file_holds_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    tuned = weft.adapt(tiny(torch.bfloat16), "lora", 2)
    with pytest.raises(WeftError, match="A gguf-lora file is stored in float32, not in bfloat16"):
        weft.export(tuned, tmp_path / "out", "gguf-lora", dtype=torch.bfloat16)
    assert weft.export(tuned, tmp_path / "half", "gguf-lora")["dtype"] == "float32"
    assert "written in" not in capsys.readouterr().err
    with pytest.raises(WeftError, match="has no adapter"):
        weft.export(tiny(), tmp_path / "out", "gguf-lora")
    with pytest.raises(WeftError, match="no LoRA of llama.cpp"):
        weft.export(weft.adapt(tiny(), "dora", 2), tmp_path / "out", "gguf-lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("llama", torch.float32),
        ("llama", torch.float16),
        ("llama", torch.bfloat16),
        *((k, torch.float16) for k in QWENS),
    ],
)
def test_gguf_of_a_dense_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = small(kind).to(dtype)
    config = model.config
    weft.compress(model, "svd", budget=0.8)
    done = weft.export(model, tmp_path / "out", "gguf")
    assert done["dtype"] == str(dtype).removeprefix("torch.") and done["dense"] == 7
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    assert type(again) is type(model)
    plain = AutoModelForCausalLM.from_config(config).eval()  # a cast of a whole model rounds its rotary frequencies too
    plain.load_state_dict(weft.merge(model).state_dict())
    torch.testing.assert_close(logits(again), logits(plain), **TOLERANCE)


def test_gguf_brings_its_tokenizer(tiny_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run(str(tiny_directory), tmp_path / "out", format="gguf", device="cpu")
    ours = AutoTokenizer.from_pretrained(tiny_directory)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "def f(x):\n    return [x, 12345, 'ä'] # <|endoftext|> and more"
    assert theirs(text).input_ids == ours(text).input_ids and theirs.eos_token == ours.eos_token
    assert (tmp_path / "out/README.md").read_text().count("library_name: gguf") == 1


def test_gguf_refuses_what_it_has_no_words_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    scaled = tiny(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    cases = [(scaled, r"rotary embedding \(linear\)"), (coded(tiny(), 4, 16), "has groups of 16 along 64 inputs")]
    int8 = weft.quantize(tiny(), "int8")
    cases.append((int8, "its scales are no numbers of float16"))
    for model, words in cases:
        with pytest.raises(WeftError, match=words):
            weft.export(model, tmp_path / "out", "gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeftError, match="needs the package gguf: pip install"):
        run("pico", tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_files_are_models_like_any(tiny_directory: Path, tmp_path: Path) -> None:
    """A file by its path, by --gguf-file, or alone in a directory: the same bits; what comes of it is a plain model."""
    pytest.importorskip("gguf")
    run(str(tiny_directory), tmp_path / "dir", format="gguf", device="cpu")
    (tmp_path / "text.txt").write_text("def add(first, second):\n    return first + second\n" * 20)
    common = ["--method", "svd", "--budget", "0.6", "--window", "32", "--windows", "2", "--device", "cpu", "--json"]
    common += ["--calibration", str(tmp_path / "text.txt")]
    ways = {
        "path": [str(tmp_path / "dir/model.gguf")],
        "option": [str(tmp_path / "dir"), "--gguf-file", "model.gguf"],
        "plain": [str(tiny_directory)],
    }
    for name, way in ways.items():
        done = CliRunner().invoke(app, ["compress", *way, "-o", str(tmp_path / name), *common])
        assert done.exit_code == 0, done.output
    path, option, plain = (load_file(tmp_path / name / "model.safetensors") for name in ways)
    assert path.keys() == option.keys() == plain.keys()
    assert all(torch.equal(path[key], option[key]) and torch.equal(path[key], plain[key]) for key in plain)
    model, tokenizer = load_model(str(tmp_path / "dir"), device="cpu"), load_tokenizer(str(tmp_path / "dir"))
    model.save_pretrained(tmp_path / "again")  # no marks of a quantiser are left
    assert len(tokenizer) == 8192 and "quantization_config" not in (tmp_path / "again/config.json").read_text()


def test_gguf_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"")
    cases = {
        "two": "holds 2 GGUF files; name one of them: --gguf-file a.gguf",
        "two/c.gguf": "There is no GGUF file .*c.gguf",
        "two/a.gguf": "a.gguf cannot be loaded",
    }
    for name, words in cases.items():
        with pytest.raises(WeftError, match=words):
            load_model(str(tmp_path / name), device="cpu")
    monkeypatch.setattr("weft.runs.loading.find_spec", lambda name: None)
    with pytest.raises(WeftError, match="read by the package gguf: pip install gguf"):
        load_model(str(tmp_path / "two/a.gguf"), device="cpu")
