from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import weft
from weft.errors import WeftError
from weft.io.quantizer import mark
from weft.terms import Dense, LowRank, Sparse, SumLinear
from weft.terms.layers import linear_layers, replace, weight_of
from weft.terms.put import put
from weft.verbs.merge import merge, run

NAME = "model.layers.0.mlp.up_proj"


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(1)
    made = tiny()
    for name, layer in linear_layers(made).items():
        W = weight_of(layer)
        B, A = torch.randn(W.shape[0], 2, generator=generator), torch.randn(2, W.shape[1], generator=generator)
        terms = {"low_rank": LowRank.from_factors(B, A, scale=0.1), "sparse": Sparse.from_mask(W, W > 0.01)}
        replace(made, name, SumLinear(terms, layer.bias))
    mark(made, method="by-hand")
    return made


@pytest.fixture
def saved(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "weft")
    return tmp_path / "weft"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


def test_merge_in_memory(model: LlamaForCausalLM) -> None:
    expected, sums = logits(model), {n: m.dense() for n, m in model.named_modules() if isinstance(m, SumLinear)}
    assert weft.merge(model) is model
    assert model.state_dict().keys() == tiny().state_dict().keys()
    for name, W in sums.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, W)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert model.config.to_dict() == tiny().config.to_dict()
    with pytest.raises(WeftError, match="has no sum of terms to merge"):
        weft.merge(model)


def test_terms_are_added_in_fp32_and_cast_last() -> None:
    """In bf16 the two large terms would swallow the small one."""
    large = torch.full((16, 16), 256.0, dtype=torch.bfloat16)
    small = torch.full((16, 16), 0.5, dtype=torch.bfloat16)
    layer = SumLinear({name: Dense.from_matrix(W) for name, W in (("a", large), ("b", small), ("c", -large))})
    root = nn.Module()
    root.layer = layer
    assert torch.equal(merge(root).layer.weight, small)
    assert root.layer.weight.dtype == torch.bfloat16


def test_run_writes_a_plain_directory(model: LlamaForCausalLM, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    result = run(str(saved), out, max_shard_size="4KB")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    record = json.loads((out / "run.json").read_text())
    assert record["command"] == "merge" and record["metrics"]["matrices"] == 7
    assert result["parameters"] == sum(p.numel() for p in tiny().parameters())
    assert "every weight matrix is dense" in (out / "README.md").read_text()
    assert len(list(out.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_run_keeps_or_casts_the_dtype(model: LlamaForCausalLM, saved: Path, tmp_path: Path, dtype: str | None) -> None:
    model.to(torch.bfloat16).save_pretrained(saved)
    run(str(saved), tmp_path / "dense", dtype=dtype)
    W = load_file(tmp_path / "dense" / "model.safetensors")[f"{NAME}.weight"]
    wanted = getattr(torch, dtype or "bfloat16")
    assert torch.equal(W, model.get_submodule(NAME).dense(torch.float32).to(wanted))


def test_run_refuses_a_plain_model_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().save_pretrained(tmp_path / "plain")
    monkeypatch.setattr("weft.verbs.merge.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(WeftError, match="it is a plain model already"):
        run(str(tmp_path / "plain"), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_run_refuses_an_output_in_use(saved: Path) -> None:
    with pytest.raises(WeftError, match="not empty"):
        run(str(saved), saved)


def test_adapters_are_merged_and_forgotten(tmp_path: Path) -> None:
    model = tiny()
    weft.adapt(model, "lora", rank=2)
    with torch.no_grad():
        for parameter in weft.trainable(model).parameters.values():
            parameter.normal_(std=0.1)
    expected = logits(model)
    weft.merge(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    weft.adapt(model, "lora", rank=2)  # as on any plain model
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_merge_of_a_later_change(model: LlamaForCausalLM) -> None:
    put(model, NAME, {"low_rank": LowRank.from_factors(torch.ones(24, 1), torch.ones(1, 16))}, None)
    merge(model)
    assert torch.equal(model.get_submodule(NAME).weight, torch.ones(24, 16))


def test_an_adapter_brings_its_tokenizer_and_its_tokens(tiny_directory: Path, tmp_path: Path) -> None:
    """The template and the tokens that it was trained with, and rows for them; the base has neither."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    tokenizer.chat_template = "{% for m in messages %}<call>{{ m['content'] }}{% endfor %}"
    model.resize_token_embeddings(len(tokenizer))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")

    run(str(tiny_directory), tmp_path / "merged", adapter=tmp_path / "adapter", device="cpu")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert words.chat_template == tokenizer.chat_template and "<call>" in words.get_vocab()
    assert plain.config.vocab_size == len(words) == plain.get_output_embeddings().weight.shape[0]
    ids = torch.tensor([[5, 6, len(words) - 1, 7]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)


def test_an_adapter_whose_tokens_have_no_rows_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    model = weft.adapt(AutoModelForCausalLM.from_pretrained(tiny_directory), "lora", 2)
    weft.save_adapter(model, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    tokenizer.add_tokens([f"<{i}>" for i in range(9000)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(WeftError, match="and the adapter brings no larger table"):
        run(str(tiny_directory), tmp_path / "merged", adapter=tmp_path / "adapter", device="cpu")
    assert not (tmp_path / "merged").exists()
