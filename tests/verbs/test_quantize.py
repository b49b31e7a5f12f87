"""weft.quantize: codes in place of weights, adapters over them, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weft.errors import WeftError
from weft.kernels.normal_float import NF4, Format
from weft.memory import lean, lean_report
from weft.methods import METHODS
from weft.terms import SumLinear
from weft.terms.adapters import disable
from weft.terms.layers import linear_layers, weight_of
from weft.terms.quantized import Quantized
from weft.verbs.adapt import adapt, remove_adapter, trainable
from weft.verbs.compress import run as compress
from weft.verbs.quantize import choose_formats, quantize, run

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32, "vocab_size": 53}


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, initializer_range=0.2, **SHAPE))


def batch():
    ids = torch.randint(0, 53, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def distance(left, right):
    names = linear_layers(left)
    return (
        sum(float((weight_of(left.get_submodule(n)) - weight_of(right.get_submodule(n))).norm() ** 2) for n in names)
        ** 0.5
    )


CODES = [name for name, method in METHODS.items() if method.kind == "quantize" and not method.needs]


@pytest.mark.parametrize("scheme", CODES)
def test_every_scheme_replaces_every_layer(scheme):
    model = llama()
    original = copy.deepcopy(model)
    assert quantize(model, scheme) is model
    layers = linear_layers(model)
    assert len(layers) == 14 and all(isinstance(m, SumLinear) for m in layers.values())
    assert all(isinstance(next(iter(m.terms.values())), Quantized) for m in layers.values())
    for name, layer in layers.items():
        W = weight_of(original.get_submodule(name))
        assert (weight_of(layer) - W).norm() < (0.7 if scheme == "nf2" else 0.3) * W.norm()
    with pytest.raises(WeftError, match="in codes or factors already; quantise the model that it was made of"):
        quantize(model, scheme)
    assert not list(p for n, p in model.named_parameters() if "proj" in n)


def test_conv1d_keeps_its_bias_and_orientation():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=53)).eval()
    expected = model(**batch()).logits
    quantize(model, "nf8")
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=0.02)
    assert all(m.transposed and m.bias is not None for m in linear_layers(model).values())


def test_qlora_starts_on_the_code_and_trains_the_adapter_alone():
    model = adapt(quantize(llama(), "nf4"), "lora", rank=4)
    with disable(model):
        base = model(**batch()).logits
    torch.testing.assert_close(model(**batch()).logits, base)
    assert trainable(model).count == sum(4 * (m.in_features + m.out_features) for m in linear_layers(model).values())
    plain = model(**batch()).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in trainable(model).parameters.items()}
    model.zero_grad()
    lean(model).train()(**batch()).loss.backward()
    assert lean_report(model).lean["sum_linear"] == 14 and not lean_report(model).left
    for name, p in trainable(model).parameters.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_lq_lora_is_nearer_than_the_code_alone_and_learns():
    original = llama()
    alone, model = quantize(llama(), "nf4"), quantize(llama(), "lq-lora", rank=8, alpha=16, iterations=2)
    assert distance(model, original) < 0.9 * distance(alone, original)
    assert set(trainable(model).parameters) == {f"{n}.terms.default.{f}" for n in linear_layers(model) for f in "AB"}
    optimizer = torch.optim.Adam(trainable(model).parameters.values(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**batch()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    remove_adapter(model)
    assert all(list(m.terms) == ["base"] for m in linear_layers(model).values())


def test_bits_are_spent_within_the_budget_and_better_than_evenly():
    original = llama()
    for layer in (original.model.layers[0].mlp.up_proj, original.model.layers[1].self_attn.q_proj):
        layer.weight.data *= 5  # layers that deserve more bits
    even = quantize(copy.deepcopy(original), "lq-lora", rank=2, bits=3.2, formats=[Format(bits=3)], iterations=1)
    model = quantize(copy.deepcopy(original), "lq-lora", rank=2, bits=3.2, iterations=1)
    bases = [m.terms["base"] for m in linear_layers(model).values()]
    spent = sum(b.format.bits_per_weight * b.num_params for b in bases) / sum(b.num_params for b in bases)
    assert spent <= 3.2 and len({b.format for b in bases}) > 1
    assert distance(model, original) < distance(even, original)


def test_fisher_weights_are_used():
    g = torch.Generator().manual_seed(0)
    stats = {
        name: {
            "fisher_rows": torch.rand(m.out_features, generator=g),
            "fisher_columns": torch.rand(m.in_features, generator=g),
        }
        for name, m in linear_layers(llama()).items()
    }
    plain, weighted = (
        quantize(llama(), "lq-lora", "q_proj", rank=4, iterations=1, stats=given) for given in (None, stats)
    )
    assert distance(plain, weighted) > 0


def test_the_paper_budget_at_equal_formats():
    weights = {str(i): torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    assert set(choose_formats(weights, 2, NF4.bits_per_weight, [Format(bits=3), NF4]).values()) == {NF4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "nf5"}, "no scheme of quantisation called 'nf5'; the nearest are: nf"),
        ({"scheme": "nf4", "rank": 8}, "nf4 has no low-rank term for a rank or alpha"),
        ({"scheme": "int8", "bits": 4}, "int8 has 8 bits, not 4"),
        ({"scheme": "rtn", "bits": 3.5}, "rtn has 2, 3, 4, 5, 6, 7, 8 bits, not 3.5"),
        ({"targets": "q_prj"}, "matches no linear layer; the nearest names are: q_proj"),
        ({"scheme": "lq-lora", "rank": 99}, "Rank 99 is not possible on"),
        ({"scheme": "lq-lora", "rank": 2, "bits": 1.5}, "give at least 2.1"),
        ({"scheme": "lq-lora", "rank": 2, "stats": {}}, "lack fisher_rows"),
    ],
)
def test_mistakes_leave_the_model_alone(arguments, message):
    model = llama()
    with pytest.raises(WeftError, match=message):
        quantize(model, **arguments)
    assert not any(isinstance(m, SumLinear) for m in model.modules())


@pytest.mark.parametrize("scheme", ["nf4", "rtn", "int8", "mxfp4", "lq-lora"])
def test_a_weight_that_is_not_finite_is_refused_before_any_is_changed(scheme):
    model = llama()
    last = model.get_submodule("model.layers.1.mlp.down_proj")
    last.weight.data[3, 4] = float("inf")
    with pytest.raises(WeftError, match=r"The weight of layer model.layers.1.mlp.down_proj holds NaN or infinity"):
        quantize(model, scheme)
    assert not any(isinstance(module, SumLinear) for module in model.modules())


def test_an_adapter_that_is_on_is_named():
    with pytest.raises(WeftError, match=r"adapters on this model \(default\); quantise first"):
        quantize(adapt(llama(), "lora", rank=2))


@pytest.mark.parametrize(
    ("options", "bits", "kinds"),
    [
        ({}, (4, 6), {"normal_float"}),
        ({"bits": 2.0}, (2, 4), {"normal_float"}),
        ({"scheme": "int8", "targets": ["q_proj"]}, (8, 10), {"int8"}),
        ({"scheme": "lq-lora", "rank": 3, "bits": 3.5}, (2, 6), {"normal_float", "low_rank"}),
    ],
)
def test_a_directory_in_codes_is_opened_again(options, bits, kinds, tiny_directory, tmp_path):
    done = run(str(tiny_directory), tmp_path / "small", **options)
    assert done["bytes"] < done["bytes_before"] and bits[0] <= done["bits_per_weight"] <= bits[1]
    assert done["matrices"] == (2 if "targets" in options else 14)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    sums = [m for m in model.modules() if isinstance(m, SumLinear)]
    assert {term.kind for layer in sums for term in layer.terms.values()} == kinds and len(sums) == done["matrices"]
    expected = AutoModelForCausalLM.from_pretrained(tiny_directory)
    given = {"scheme": f"nf{options.get('bits', 4):g}", **options}
    mean = {key: given[key] for key in ("bits", "rank") if given["scheme"] == "lq-lora"}
    quantize(expected, given["scheme"], given.get("targets", "all-linear"), **mean)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-6, rtol=1e-5)
    assert json.loads((tmp_path / "small" / "run.json").read_text())["command"] == "quantize"
    adapt(model, "lora", 2)  # QLoRA
    assert trainable(model).count > 0


def test_what_is_in_factors_is_left_and_said(tmp_path):
    compress("pico", tmp_path / "half", method="svd", budget=0.8, allocate="uniform", layers=["*.mlp.*"])
    done = run(str(tmp_path / "half"), tmp_path / "codes")
    assert 0 < done["covered"] < 0.5 and "in factors already" in str(done["left"])
