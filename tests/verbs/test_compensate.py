"""EoRA: optimal in the inputs' second moment, against the closed form, and sequential over the layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.errors import WeftError
from weft.stats.calibrate import calibrate
from weft.terms.adapters import adapters_of, disable, find_adapter
from weft.terms.layers import linear_layers, weight_of
from weft.testing_adapters import tiny_gpt2
from weft.verbs.compensate import compensate

BATCHES = [{"input_ids": torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]
FIRST = "model.layers.0.self_attn.q_proj"


def dense(blocks: int = 2) -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": blocks}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)).eval()


def quantised() -> nn.Module:
    return weft.quantize(dense(), "nf2")


def pruned() -> nn.Module:
    """Half of each row's weights are zero."""
    model = dense()
    for layer in linear_layers(model).values():
        small = layer.weight.abs() < layer.weight.abs().median(dim=1, keepdim=True).values
        layer.weight.data[small] = 0
    return model


def truncated() -> nn.Module:
    model = dense()
    weft.compress(model, "svd", budget=0.5)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(**BATCHES[0]).logits
    return out


def output_error(D: Tensor, C: Tensor) -> Tensor:
    return (D @ C @ D.mT).diagonal().sum().clamp(min=0).sqrt()


@pytest.mark.parametrize("make", [quantised, pruned, truncated])
def test_each_layer_is_optimal_on_the_compensated_model(make: Callable[[], nn.Module]) -> None:
    model, original, r = make(), dense(), 3
    assert compensate(model, original, BATCHES, rank=r) is model
    moments = calibrate(model, BATCHES, ("input_moment",))  # every layer's inputs with all before it compensated
    for layer, terms in find_adapter(model).terms.items():
        C = moments[layer]["input_moment"].double()
        with disable(model):
            dW = (weight_of(original.get_submodule(layer)) - weight_of(model.get_submodule(layer))).double().detach()
        BA = terms["eora"].dense(torch.float64).detach()
        values, vectors = torch.linalg.eigh(C)
        root = vectors * values.clamp(min=0).sqrt()
        s = torch.linalg.svdvals(dW @ root)
        torch.testing.assert_close(output_error(dW - BA, C), s[r:].norm(), rtol=1e-4, atol=1e-6 * float(s[0]))
        U, S, V = torch.linalg.svd(dW)
        plain = dW - (U[:, :r] * S[:r]) @ V[:r]
        assert output_error(dW - BA, C) <= output_error(plain, C) * (1 + 1e-6), "never above the plain SVD"
        assert torch.linalg.matrix_norm(BA, 2) <= S[0] * (1 + 1e-5)


def test_it_brings_the_outputs_nearer() -> None:
    target = logits(dense())
    errors = [(logits(quantised()) - target).norm()]
    for rank in (2, 6, 12):
        errors.append((logits(compensate(quantised(), dense(), BATCHES, rank=rank)) - target).norm())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_full_rank_repairs_everything() -> None:
    model = compensate(quantised(), dense(), BATCHES, rank=16)
    torch.testing.assert_close(logits(model), logits(dense()), atol=1e-4, rtol=1e-4)


def test_nothing_to_repair_is_zero() -> None:
    model = compensate(dense(), dense(), BATCHES, rank=2)
    assert all(float(term.dense().detach().abs().max()) == 0 for term in find_adapter(model).all_terms())
    assert torch.equal(logits(model), logits(dense()))


def test_fewer_tokens_than_channels() -> None:
    few = [{"input_ids": torch.tensor([[3, 4, 5]])}]
    model, original = compensate(quantised(), dense(), few, rank=8), dense()
    with torch.no_grad():
        assert torch.isfinite(logits(model)).all()
        torch.testing.assert_close(model(**few[0]).logits, original(**few[0]).logits, atol=1e-4, rtol=1e-4)


def test_conv1d_and_an_original_on_disk(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "dense")
    model = compensate(weft.quantize(tiny_gpt2(), "nf2"), tmp_path / "dense", BATCHES, rank=16)
    torch.testing.assert_close(logits(model), logits(tiny_gpt2()), atol=1e-4, rtol=1e-4)


def test_it_is_a_lora_for_every_reader(tmp_path: Path) -> None:
    model = compensate(pruned(), dense(), BATCHES, rank=3)
    weft.save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(weft.load_adapter(pruned(), tmp_path / "a")), logits(model))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(pruned(), tmp_path / "a")), logits(model))
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in weft.trainable(model).parameters.values())
    weft.remove_adapter(model)
    assert torch.equal(logits(model), logits(pruned()))


def test_mistakes() -> None:
    model = quantised()
    before = logits(model)
    for given, options, sentence in (
        (dense(), {"rank": 17}, "Rank 17 is not possible on"),
        (dense(), {"rank": 2, "targets": "r_proj"}, "matches no linear layer"),
        (dense(1), {"rank": 2}, "which lacks it; give the model that was compressed"),
        ("./missing", {"rank": 2}, "There is no directory"),
    ):
        with pytest.raises(WeftError, match=sentence):
            compensate(model, given, BATCHES, **options)
    with pytest.raises(WeftError, match="needs data"):
        compensate(model, dense(), [])
    with pytest.raises(RuntimeError):
        compensate(model, dense(), BATCHES, rank=2, track=failing)
    assert not adapters_of(model) and torch.equal(logits(model), before)


def failing(items: object, what: str) -> object:
    raise RuntimeError("interrupted")
