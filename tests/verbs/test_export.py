"""`weft.export`: what is written is what the model is, read again by an independent reading of each layout."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import weft
from weft.cli import app
from weft.errors import WeftError
from weft.io.formats import FORMATS
from weft.io.formats.packing import pack, unpack
from weft.io.quantizer import mark
from weft.terms import Codebook, IntegerCode, LowRank, Sparse, SumLinear, Term
from weft.terms.layers import linear_layers, weight_of
from weft.terms.put import put
from weft.verbs.export import run

IDS = torch.arange(12).view(2, 6)
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
LAYER = "model.layers.0.mlp.down_proj"


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).to(dtype).eval()


def coded(
    model: Any,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    rank: int = 0,
    only: str = "*",
    scales: torch.dtype = torch.float16,
) -> Any:
    """The model with its layers in codes, and factors beside them where there is a rank."""
    generator = torch.Generator().manual_seed(1)
    for name, module in linear_layers(model, only).items():
        weight = weight_of(module)
        code = IntegerCode.from_matrix(weight, bits, group, symmetric=symmetric, scale_dtype=scales)
        terms: dict[str, Term] = {"code": code}
        if rank:
            B, A = (torch.randn(s, generator=generator) * 0.1 for s in ((len(weight), rank), (rank, weight.shape[1])))
            terms["low_rank"] = LowRank.from_factors(B.to(weight.dtype), A.to(weight.dtype))
        put(model, name, terms)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()


def by_hand(words: np.ndarray, bits: int, index: int) -> int:
    """Code `index` of a row of 32-bit words, one bit at a time."""
    bit = [int(words[j // 32]) >> (j % 32) & 1 for j in range(index * bits, (index + 1) * bits)]
    return sum(value << i for i, value in enumerate(bit))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_in_words_as_they_are_said_to(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 45), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-45 * bits // 32))
    for row, index in ((0, 0), (1, 10), (2, 21), (2, 44)):
        assert by_hand(words[row].numpy(), bits, index) == codes[row, index]
    assert torch.equal(unpack(words, bits, 45), codes)


def gptq_weight(tensors: dict[str, Tensor], layer: str, bits: int, first: bool) -> Tensor:
    """W (out, in) of GPTQ's four tensors, element by element."""
    parts = {key: tensors[f"{layer}.{key}"].numpy() for key in ("qweight", "qzeros", "scales", "g_idx")}
    inn, out = len(parts["g_idx"]), parts["scales"].shape[1]
    W = torch.empty(out, inn)
    for j in range(inn):
        group = parts["g_idx"][j]
        for i in range(out):
            code = by_hand(parts["qweight"][:, i], bits, j)
            zero = by_hand(parts["qzeros"][group], bits, i) + first
            W[i, j] = float(parts["scales"][group, i]) * (code - zero)
    return W


@pytest.mark.parametrize("bits, symmetric", [(4, True), (3, True), (4, False), (2, False), (8, True)])
def test_gptq(bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = coded(tiny(torch.float16), bits, 32, symmetric)
    done = weft.export(model, tmp_path / "out", "gptq")
    assert (done["coded"], done["dense"], done["dtype"]) == (7, 0, "float16")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (said["bits"], said["group_size"], said["sym"], said["desc_act"]) == (bits, 32, symmetric, False)
    assert said["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2") and "dynamic" not in said
    stored = load_file(tmp_path / "out/model.safetensors")
    layer = "model.layers.0.self_attn.k_proj"
    W = gptq_weight(stored, layer, bits, symmetric)
    assert torch.equal(W, model.get_submodule(layer).dense(torch.float32))
    assert f"{layer}.weight" not in stored and stored["model.norm.weight"].dtype == torch.float16


def test_gptq_names_layers_that_differ(tmp_path: Path) -> None:
    model = coded(tiny(torch.float16), only="*self_attn*")
    coded(model, 8, 48, True, only="*down_proj")
    weft.export(model, tmp_path / "out", "gptq")
    dynamic = json.loads((tmp_path / "out/quantize_config.json").read_text())["dynamic"]
    assert dynamic["+:^model\\.layers\\.0\\.mlp\\.down_proj$"] == {"bits": 8, "group_size": 48, "sym": True}
    assert dynamic["-:^model\\.layers\\.0\\.mlp\\.up_proj$"] == {} and len(dynamic) == 3


@pytest.mark.parametrize("bits, group, symmetric", [(4, 32, True), (3, 32, False), (8, 1000, True)])
def test_compressed_tensors(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    """The tensors are read by hand here, and by the package in tests/integrations."""
    model = tiny()
    for name, module in linear_layers(model).items():  # a group as long as the row: a scale a channel
        coded(model, bits, min(group, weight_of(module).shape[1]), symmetric, only=name)
    weft.export(model, tmp_path / "out", "compressed-tensors")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["targets"] == ["Linear"] and said["ignore"] == ["lm_head"]
    stored = load_file(tmp_path / "out/model.safetensors")
    for name, layer in linear_layers(model).items():
        out, inn = stored[f"{name}.weight_shape"].tolist()
        codes = unpack(stored[f"{name}.weight_packed"], bits, inn).float()
        scales = stored[f"{name}.weight_scale"]
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if not symmetric:
            zeros = unpack(stored[f"{name}.weight_zero_point"].T.contiguous(), bits, out).T.float()
        repeat = inn // scales.shape[1]
        W = (codes - zeros.repeat_interleave(repeat, 1)) * scales.repeat_interleave(repeat, 1)
        assert torch.equal(W, layer.dense())  # type: ignore[operator]


@pytest.mark.parametrize("scheme, bits, layout", [
    ("fp8", 8, "float-quantized"), ("mxfp8", 8, "mxfp8-quantized"), ("mxfp6", 6, "mxfp6-pack-quantized"),
    ("mxfp4", 4, "mxfp4-pack-quantized"),
])  # fmt: skip
def test_compressed_tensors_of_floating_point_codes(scheme: str, bits: int, layout: str, tmp_path: Path) -> None:
    """As above; the numbers of an element by the formula, or as torch has them."""
    model = tiny(torch.bfloat16)
    weft.compress(model, [(scheme, {"scale": "bfloat16"} if scheme == "fp8" else {})])
    done = weft.export(model, tmp_path / "out", "compressed-tensors")
    assert (done["coded"], done["dtype"]) == (7, "bfloat16")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["format"] == layout == said["config_groups"]["group_0"]["format"]
    stored = load_file(tmp_path / "out/model.safetensors")
    for name, layer in linear_layers(model).items():
        scales = stored[f"{name}.weight_scale"]
        assert scales.dtype == (torch.bfloat16 if scheme == "fp8" else torch.uint8)
        scales = scales.float() if scheme == "fp8" else 2.0 ** (scales.float() - 127)
        inn = layer.in_features
        if bits == 8:
            assert stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
            numbers = stored[f"{name}.weight"].float()
        else:
            codes = unpack(stored[f"{name}.weight_packed"].view(torch.int32), bits, inn).int()
            e, m = codes >> (bits - 3 if bits == 4 else 3) & 3, codes & (1 if bits == 4 else 7)
            steps = 2 if bits == 4 else 8
            sizes = torch.where(e == 0, m / steps, 2.0 ** (e - 1) * (1 + m / steps))
            numbers = torch.where(codes >> (bits - 1) == 1, -sizes, sizes)
        W = numbers * scales.repeat_interleave(inn // scales.shape[1], 1)
        assert torch.equal(W, layer.dense(torch.float32))


def test_integers_and_floats_beside_each_other(tmp_path: Path) -> None:
    model = coded(tiny(torch.bfloat16), 4, only="*self_attn*", scales=torch.bfloat16)
    weft.quantize(model, "mxfp4", targets=["gate_proj", "up_proj", "down_proj"])
    weft.export(model, tmp_path / "out", "compressed-tensors")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert [group["format"] for group in said["config_groups"].values()] == ["pack-quantized", "mxfp4-pack-quantized"]


def test_widths_that_differ_are_groups_by_name(tmp_path: Path) -> None:
    model = coded(tiny(), 4, only="*self_attn*")
    coded(model, 2, only="*up_proj")
    weft.export(model, tmp_path / "out", "compressed-tensors")
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert [len(group["targets"]) for group in groups.values()] == [4, 1]
    assert groups["group_1"]["targets"] == ["model.layers.0.mlp.up_proj"]


def test_hf_is_what_merge_writes(tmp_path: Path) -> None:
    model = coded(tiny(torch.bfloat16), rank=2)
    mark(model, "rtn")
    before, marks = logits(model), model.config.quantization_config.to_dict()
    done = weft.export(model, tmp_path / "out")
    assert done["dense"] == 7 and done["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert torch.equal(logits(model), before) and model.config.quantization_config.to_dict() == marks
    assert sum(isinstance(module, SumLinear) for module in model.modules()) == 7
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in written and "_is_quantized" not in written
    merged = weft.merge(copy.deepcopy(model))
    merged.save_pretrained(tmp_path / "merged")
    plain = load_file(tmp_path / "out/model.safetensors")
    assert all(
        torch.equal(tensor, plain[name]) for name, tensor in load_file(tmp_path / "merged/model.safetensors").items()
    )


def test_factors_beside_codes_are_an_adapter(tmp_path: Path) -> None:
    """Base plus adapter is the sum; PEFT itself adds them in tests/integrations."""
    model = coded(tiny(), rank=3)
    done = weft.export(model, tmp_path / "out", "compressed-tensors")
    assert done["adapter"] == 7
    config = json.loads((tmp_path / "out/peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out") and config["r"] == config["lora_alpha"] == 3
    factors = load_file(tmp_path / "out/peft/adapter_model.safetensors")
    B, A = (factors[f"base_model.model.{LAYER}.lora_{part}.weight"] for part in "BA")
    layer = model.get_submodule(LAYER)
    torch.testing.assert_close(layer.terms["code"].dense() + B @ A, layer.dense())
    card = (tmp_path / "out/README.md").read_text()
    assert 'PeftModel.from_pretrained(model, "path-of-this-directory/peft")' in card and "dequantize=True" in card
    sizes = [
        (tmp_path / "out" / name).stat().st_size for name in ("model.safetensors", "peft/adapter_model.safetensors")
    ]
    assert done["bytes"] == sum(sizes), "both are the model"


def test_codes_that_a_format_does_not_have_are_said_to_be_written_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = coded(tiny(torch.float16), only="*self_attn*")
    weft.compress(model, [("nf4", {})], layers="*down_proj")
    done = weft.export(model, tmp_path / "out", "compressed-tensors")
    assert (done["coded"], done["dense"]) == (4, 1)
    said = capsys.readouterr().err
    assert "since compressed-tensors does not have their codes (model.layers.0.mlp.down_proj is a sum of normal" in said
    assert "normal_float): 1 of the layers. `weft" in said


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_model_of_other_codes_alone_is_told_which_call_makes_integers(format: str, tmp_path: Path) -> None:
    model = tiny()
    for name, module in linear_layers(model).items():
        W = weight_of(module)
        put(model, name, {"code": Codebook.from_codes(torch.zeros_like(W, dtype=torch.uint8), W.new_ones(1, 8))})
    with pytest.raises(WeftError, match=r"sum of codebook\); --format hf .*methods=yaqa:clip=true.*without table=true"):
        weft.export(model, tmp_path / "out", format)
    weft.compress(model := tiny(), "svd", budget=0.5)
    with pytest.raises(WeftError, match=r"low_rank\); --format hf writes it dense.$"):
        weft.export(model, tmp_path / "out", format)


def test_scales_decide_the_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scales that bf16 does not hold: fp16 where it does, fp32 where not; asked for, it is refused with the layer."""
    model = coded(tiny(torch.bfloat16))
    assert weft.export(model, tmp_path / "half", "compressed-tensors")["dtype"] == "float16"
    assert "does not hold the scales of the codes in torch.bfloat16" in capsys.readouterr().err
    with pytest.raises(WeftError, match=r"self_attn.q_proj: its scales are no numbers of bfloat16"):
        weft.export(model, tmp_path / "refused", "compressed-tensors", dtype=torch.bfloat16)
    model = coded(tiny(torch.bfloat16), scales=torch.float32)
    assert weft.export(model, tmp_path / "single", "compressed-tensors")["dtype"] == "float32"
    with pytest.raises(WeftError, match=r"no numbers of float16, so that gptq cannot hold it exactly"):
        weft.export(model, tmp_path / "refused", "gptq")
    assert not list(tmp_path.glob("refused*"))


def sparse_beside(model: Any) -> Any:
    layer = coded(model).get_submodule(LAYER)
    eye = torch.eye(*layer.dense().shape)
    layer.terms["rest"] = Sparse.from_mask(eye, eye.bool())
    return model


REFUSED = {
    "no codes": (
        lambda: weft.quantize(tiny(), "nf4"),
        "compressed-tensors",
        r"No layer .* \(.*q_proj is a sum of normal",
    ),
    "a plain model": (tiny, "gptq", "No layer of this model is in integer codes; "),
    "five bits": (lambda: coded(tiny(), 5), "gptq", r"q_proj: its codes have 5 bits"),
    "sides": (lambda: coded(tiny(intermediate_size=48), 4, 16), "gptq", r"gate_proj: 48 x 64 is no multiple of 32"),
    "a short last group": (
        lambda: coded(tiny(torch.bfloat16, intermediate_size=80), 4, 32),
        "compressed-tensors",
        r"down_proj: its 80 inputs are no whole number of groups of 32 \(those of 16 divide them: weft compress",
    ),
    "shared exponents in fp32": (
        lambda: weft.quantize(tiny(), "mxfp4"),
        "compressed-tensors",
        r"q_proj: shared exponents are for models of bf16 alone \(--dtype bfloat16\)",
    ),
    "floats in GPTQ": (lambda: weft.quantize(tiny(), "fp8"), "gptq", "No layer of this model is in integer codes"),
    "another term": (lambda: sparse_beside(tiny()), "gptq", rf"{LAYER} has a term of kind 'sparse' beside its codes"),
    "format": (tiny, "gtpq", "There is no format called 'gtpq'; the nearest are: gptq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, format, words = REFUSED[case]
    model = make()
    with pytest.raises(WeftError, match=words):
        weft.export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.self_attn.q_proj"])
def test_numbers_beyond_the_range_of_the_dtype_are_refused(name: str, tmp_path: Path) -> None:
    """Where bf16 is written in fp16 they would be infinite: of a dense tensor, and of a sum that becomes one."""
    model = coded(tiny(torch.bfloat16), only="*mlp*")
    if name == "model.norm":
        model.model.norm.weight.data[3] = 1e5
    else:
        put(model, name, {"base": LowRank.from_factors(*(torch.full(s, 300.0).bfloat16() for s in ((64, 2), (2, 64))))})
    with pytest.raises(WeftError, match=rf"{name}.weight has numbers beyond the largest of float16"):
        weft.export(model, tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())
    assert weft.export(model, tmp_path / "out", "hf")["dtype"] == "bfloat16"


def test_a_transposed_layer_has_no_place(tmp_path: Path) -> None:
    model = coded(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=40, n_positions=16)))
    with pytest.raises(WeftError, match=r"attn.c_attn: it stands for a Conv1D, so that compressed-tensors"):
        weft.export(model, tmp_path / "out", "compressed-tensors")
    assert weft.export(model, tmp_path / "out", "hf")["dense"] == 4


@pytest.mark.parametrize("format", ["hf", "compressed-tensors"])
def test_experts_of_a_mixture_are_refused(format: str, tmp_path: Path) -> None:
    sizes = {key: value for key, value in tiny().config.to_dict().items() if key in SIZES}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))
    weft.quantize(model, "int8")
    with pytest.raises(WeftError, match=r"experts.0.gate_up is an expert of a mixture.*weft merge"):
        weft.export(model, tmp_path / "out", format)
    assert logits(model).isfinite().all() and not list(tmp_path.iterdir())


def test_on_the_command_line(tiny_directory: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    model = weft.quantize(AutoModelForCausalLM.from_pretrained(tiny_directory), "int8")
    model.save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained(tiny_directory).save_pretrained(tmp_path / "int8")
    arguments = ["export", str(tmp_path / "int8"), "-o", str(tmp_path / "served"), "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--format", "compressed-tensors"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["coded"] == 14
    record = json.loads((tmp_path / "served/run.json").read_text())
    assert record["command"] == "export" and record["metrics"]["format"] == "compressed-tensors"
    card = (tmp_path / "served/README.md").read_text()
    assert "library_name: transformers" in card and "import weft" not in card
    assert (tmp_path / "served/tokenizer.json").is_file()
    refused = CliRunner().invoke(app, [*arguments, "--format", "gptq"])
    assert refused.exit_code == 2 and "not empty" in refused.output
    plain = run(str(tiny_directory), tmp_path / "plain", device="cpu")
    assert plain["dense"] == 0 and "covered" not in plain, "nothing of a plain model is left as it is for a reason"
    shutil.rmtree(tmp_path / "plain")
    with pytest.raises(WeftError, match="is stored in float16, not in float32"):
        run(str(tmp_path / "int8"), tmp_path / "plain", format="gptq", dtype="float32", device="cpu")


def test_every_format_has_its_name() -> None:
    assert list(FORMATS) == ["compressed-tensors", "gptq", "gguf", "gguf-lora", "hf"]
    assert all(FORMATS[name].name == name for name in FORMATS)
