"""The fingerprint of a base: the same in every dtype, another for other weights, and never a reason not to load."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import weft
from weft.io.base import COUNT, Base, base_of, other_weights, sample
from weft.terms.layers import linear_layers
from weft.terms.put import put
from weft.testing_adapters import tiny_gpt2, tiny_llama
from weft.testing_examples import EXAMPLES, example

Q = "model.layers.0.self_attn.q_proj"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def samples(model: nn.Module) -> dict:
    return sample(model, linear_layers(model))


def other_llama() -> nn.Module:
    model = tiny_llama()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_numbers_of_the_weights(make: type) -> None:
    model = make()
    found = samples(model)
    assert found == samples(make()) and found.keys() > set(linear_layers(model))
    for name, one in found.items():
        weight = model.get_submodule(name).weight.detach()
        assert len(one.values) == COUNT and one.dtype == "float32"
        assert all((weight - value).abs().min() < 1e-5 for value in one.values), name
    assert len({value for one in found.values() for value in one.values}) > 0.9 * COUNT * len(found)


def test_an_adapter_on_top_does_not_change_it() -> None:
    for method in ("pissa", "dora"):
        assert samples(weft.adapt(tiny_llama(), method, 2)) == samples(tiny_llama())


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_and_codes_are_the_same_weights(dtype: torch.dtype) -> None:
    ours = samples(tiny_llama())
    theirs = samples(tiny_llama(dtype))
    assert other_weights(ours, theirs) is None and theirs[Q].dtype == str(dtype).removeprefix("torch.")
    for scheme in ("nf4", "int8"):
        assert other_weights(ours, samples(weft.quantize(tiny_llama(dtype), scheme))) is None


def test_other_weights_are_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(Q).weight *= 1.05
    assert other_weights(samples(tiny_llama()), samples(model)) == Q
    assert other_weights(samples(tiny_llama()), samples(other_llama())) is not None
    assert other_weights(samples(tiny_llama()), samples(weft.quantize(other_llama(), "nf4"))) is not None


def test_layers_of_zeros_and_of_no_memory() -> None:
    model = tiny_llama()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert other_weights(samples(model), samples(model)) is None
    assert sample(tiny_llama().to("meta"), [Q]) == {}


def test_it_is_written_and_read(tmp_path: Path) -> None:
    model = weft.adapt(tiny_llama(), "lora", 2, ["q_proj"])
    weft.save_adapter(model, tmp_path / "a")
    said = json.loads((tmp_path / "a" / "weft_adapter.json").read_text())["base"]
    assert Base.from_json(said) == base_of(model, [Q]) and said["targets"] == ["q_proj"]
    assert Base.from_json("somewhere") == Base("somewhere")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_weights_load_without_a_word(dtype: torch.dtype, tmp_path: Path) -> None:
    weft.save_adapter(weft.adapt(tiny_llama(), "pissa", 2), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.load_adapter(tiny_llama(dtype), tmp_path / "a")
        resized = tiny_llama()
        resized.resize_token_embeddings(40)
        weft.load_adapter(resized, tmp_path / "a")


def test_other_weights_load_with_a_sentence(tmp_path: Path) -> None:
    model = weft.adapt(tiny_llama(), "pissa", 2)
    weft.save_adapter(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"was made on other weights than this model's \(they differ in model"):
        weft.load_adapter(other_llama(), tmp_path / "a")
    weft.adapt(model, "lora", 2, name="more")
    nn.init.ones_(model.get_submodule(Q).terms["more"].B)
    weft.remove_adapter(model, "default")
    weft.merge_adapter(model)
    with pytest.warns(UserWarning, match=f"they differ in {Q}"):
        weft.load_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if not example(kind).linear])
def test_an_adapter_on_what_is_no_matrix_is_saved_and_known_again(kind: str, tmp_path: Path) -> None:
    """It is not merged, and nothing of the model is while one of its layers is no matrix."""

    def made(seed: int = 0) -> nn.Module:
        model, term = nn.Module(), example(kind, seed)
        for name in ("first", "second"):
            layer = nn.Linear(term.in_features, term.out_features, bias=False)
            nn.init.eye_(layer.weight)
            model.add_module(name, layer)
        put(model, "second", {"base": term})
        return model.eval()

    model, x = weft.adapt(made(), "lora", 2), torch.randn(3, example(kind).in_features)
    with torch.no_grad():
        for parameter in weft.trainable(model).parameters.values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        expected = model.second(x)
    weft.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = weft.load_adapter(made(), tmp_path / "adapter")
    torch.testing.assert_close(again.second(x), expected)
    with pytest.raises(weft.WeftError, match="is no matrix"):
        weft.merge_adapter(again)
    torch.testing.assert_close(again.second(x), expected)
    assert "first.terms.default.A" in again.state_dict()
    assert other_weights(sample(made(), ["second"]), sample(made(5), ["second"])) == "second"
