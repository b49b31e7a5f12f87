"""One-bit adapters: the code, its gradient, and the packed file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.kernels.bit_packing import pack as pack_codes
from weft.kernels.bit_packing import unpack
from weft.kernels.median_code import BITS, code_levels, fake_quantise, normalised, to_codes
from weft.methods import METHODS, one_bit_adapters
from weft.terms import CodedFactors, PackedFactors
from weft.terms.adapters import find_adapter
from weft.testing_adapters import RANK, adapted, task, tiny_gpt2, tiny_llama, train
from weft.verbs.adapt import adapt, trainable

IDS = task()[0]["input_ids"]
NAME = "one-bit-adapters"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(IDS).logits
    return out


# ---- the code


def test_levels_are_the_published_ones() -> None:
    assert code_levels(1) == pytest.approx([-0.67449, 0.67449], abs=1e-4)
    assert code_levels(2) == pytest.approx([-1.2657, -0.3778, 0.3778, 1.2657], abs=1e-4)
    for bits in BITS:
        levels = code_levels(bits)
        assert len(levels) == 2**bits and list(levels) == sorted(levels)
        assert all(a == -b for a, b in zip(levels, reversed(levels), strict=True))


@pytest.mark.parametrize("bits", [1, 2])
def test_levels_are_the_medians_of_their_bins(bits: int) -> None:
    """Against a large sample; at 4 and 8 bits 500 rounds are on the way."""
    sample, levels = drawn(1_000_000), code_levels(bits)
    codes = to_codes(sample, levels)
    for code, level in enumerate(levels):
        assert abs(float(sample[codes == code].median()) - level) < 5e-3


def test_two_levels_have_the_least_absolute_error() -> None:
    sample = drawn(400_000)
    errors = {level: float((sample.abs() - level).abs().mean()) for level in (0.6, 0.67449, 0.798)}
    assert errors[0.67449] == pytest.approx(0.4731, abs=2e-3)
    assert errors[0.67449] < errors[0.6] and errors[0.67449] < errors[0.798]


def test_more_bits_come_closer() -> None:
    sample = drawn(100_000)
    errors = [float((fake_quantise(sample, code_levels(bits)) - sample).abs().mean()) for bits in BITS]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.03


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 2**16), st.floats(-3, 3), st.floats(0.1, 10))
def test_the_quantiser_follows_shifts_and_scales(bits: int, seed: int, shift: float, scale: float) -> None:
    w, levels = drawn(8, 6, seed=seed).double(), code_levels(bits)
    q = fake_quantise(w, levels)
    assert len(q.unique()) <= 2**bits
    torch.testing.assert_close(fake_quantise(w + shift, levels), q + shift, atol=1e-9, rtol=1e-9)
    if bits == 1:  # the 1e-5 beside the deviation can move a number over one of many thresholds
        torch.testing.assert_close(fake_quantise(w * scale, levels), q * scale, atol=1e-4 * scale, rtol=1e-4)


def test_a_tie_goes_to_one_side() -> None:
    assert to_codes(torch.tensor([0.0, -1e-9, 1e-9]), code_levels(1)).tolist() == [0, 0, 1]


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_passes_the_quantiser_but_not_its_moments(bits: int) -> None:
    """That of u * deviation + mean + a constant times the deviation: finite differences with the codes held."""
    w, g, levels = drawn(4, 3).double().requires_grad_(), drawn(4, 3, seed=1).double(), code_levels(bits)
    (gradient,) = torch.autograd.grad((fake_quantise(w, levels) * g).sum(), w)
    u0, _, _ = normalised(w.detach())
    offset = w.new_tensor(levels)[to_codes(u0, levels)] - u0

    def held(w: Tensor) -> Tensor:
        u, mean, deviation = normalised(w)
        return (((u + offset) * deviation + mean) * g).sum()

    for i in range(4):
        for j in range(3):
            step = torch.zeros(4, 3).double()
            step[i, j] = 1e-5
            slope = (held(w.detach() + step) - held(w.detach() - step)) / 2e-5
            assert abs(float(slope - gradient[i, j])) < 1e-4


@given(st.sampled_from(BITS), st.lists(st.integers(0, 255), min_size=0, max_size=50))
def test_packing_loses_nothing(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([n % 2**bits for n in numbers], dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() == math.ceil(len(numbers) * bits / 8)
    assert torch.equal(unpack(packed, bits, len(numbers)), codes)


# ---- the adapter


@pytest.mark.parametrize("bits", BITS)
def test_the_start_is_near_the_base_and_not_on_it(bits: int) -> None:
    model = adapted(METHODS[NAME], bits=bits)
    for term in find_adapter(model).all_terms():
        assert isinstance(term, CodedFactors)
        B, A = term.factors()
        assert len(B.unique()) <= 2**bits and len(A.unique()) <= 2**bits
        assert 0 < term.B.detach().abs().max() <= 2e-3
        assert term.A.detach().abs().max() <= 1 / math.sqrt(term.in_features)
    difference = (logits(model) - logits(tiny_llama())).abs().max()
    assert 0 < difference < 0.02 * logits(tiny_llama()).abs().max()
    losses = [float(m(**task()[0]).loss.detach()) for m in (model, tiny_llama())]
    assert abs(losses[0] - losses[1]) < 0.01


def test_every_factor_learns_from_the_first_step() -> None:
    model = adapted(METHODS[NAME])
    model.train()(**task()[0]).loss.backward()
    assert all(p.grad.any() for p in trainable(model).parameters.values())
    assert trainable(model).count == sum(
        RANK * (t.in_features + t.out_features) for t in find_adapter(model).all_terms()
    )


def test_dropout_falls_between_the_factors() -> None:
    term = adapted(METHODS[NAME], dropout=0.5).train().get_submodule("model.layers.0.mlp.up_proj").terms["default"]
    torch.manual_seed(0)
    B, A = term.factors()
    x = drawn(200, term.in_features)
    with torch.no_grad():
        y, hidden = term(x), x @ A.T
    candidates = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * RANK)
    reachable = torch.einsum("mr,tr,or->mto", candidates, hidden, B.detach())
    assert (reachable - y).abs().amax(2).amin(0).max() < 1e-5
    whole = torch.einsum("tr,or->to", hidden, B.detach())
    assert not torch.allclose(y, whole), "nothing was dropped"


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("bits", BITS)
def test_the_packed_file_is_the_trained_model(bits: int, make: type, tmp_path: Path) -> None:
    model = adapted(METHODS[NAME], make, bits=bits)
    train(model, 5, lr=1e-2)
    trained, latent = logits(model), find_adapter(model)
    one_bit_adapters.pack(model)
    torch.testing.assert_close(logits(model), trained, atol=1e-6 * float(trained.abs().max()), rtol=1e-5)
    assert trainable(model).count == 0
    save_adapter(model, tmp_path / "packed", format="weft")
    state = load_file(tmp_path / "packed" / "weft_adapter.safetensors")
    sizes = [RANK * n * bits for t in latent.all_terms() for n in (t.in_features, t.out_features)]
    assert sum(t.nbytes for t in state.values()) == sum(math.ceil(size / 8) + 8 for size in sizes)
    again = load_adapter(make(), tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert all(isinstance(term, PackedFactors) for term in find_adapter(again).all_terms())
    weft.remove_adapter(model)
    assert torch.equal(logits(model), logits(make()))
    assert all(p.requires_grad for p in model.parameters())


def test_packing_leaves_other_adapters_in_use() -> None:
    model = adapt(tiny_llama(), NAME, 2, name="bits")
    adapt(model, "lora", 2, name="other")
    weft.set_adapter(model, ["other"])
    one_bit_adapters.pack(model, "bits")
    assert [a.name for a in weft.terms.adapters.adapters_of(model).values() if a.active] == ["other"]
    with pytest.raises(WeftError, match=r"'other' \(lora\) holds no quantised factors"):
        one_bit_adapters.pack(model, "other")


def test_a_bf16_model_decodes_the_same_bits() -> None:
    model = adapted(METHODS[NAME], bits=2)
    one_bit_adapters.pack(model)
    term = find_adapter(model).all_terms()[0]
    before = term.dense(torch.float32)
    assert torch.equal(term.to(torch.bfloat16).dense(torch.float32), before)


@pytest.mark.parametrize("bits", [0, 3, 32])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(WeftError, match="1, 2, 4 or 8 bits"):
        adapt(tiny_llama(), NAME, RANK, bits=bits)
