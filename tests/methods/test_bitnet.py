"""bitnet-1.58 against its lines in fp64, and what a layer of -1, 0 and 1 owes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.methods.one_layer import One, close
from tests.methods.test_structures import IN, OUT, STEPS, PlainAdam, batches, drawn, run, start
from weft.errors import WeftError
from weft.kernels.trits import packed_trits, scale_of, to_trits, trits_of, trits_size
from weft.rules.blend import Blend
from weft.terms import RoundedInputs, SumLinear, Ternary, TernaryLatent
from weft.verbs.export import export
from weft.verbs.fresh import Structure, finish, restructure
from weft.verbs.merge import merge

PLAIN = {"activations": None, "normalise": False}


def rounded(x: float) -> float:
    """Python's own: halves to the even one."""
    return float(round(x))


def ternary(W: Tensor, scale: str) -> Tensor:
    """g clip(round(W / g), -1, 1), entry by entry."""
    sizes = sorted(abs(float(w)) for w in W.flatten())
    g = sum(sizes) / len(sizes) if scale == "mean" else sizes[(len(sizes) - 1) // 2]
    return torch.tensor([[g * min(1, max(-1, rounded(float(w) / g))) for w in row] for row in W], dtype=torch.float64)


def inputs(x: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """u and what it is rounded to, token by token."""
    tokens, codes = [], []
    for token in x:
        u = token / (token.square().mean() + 1e-6).sqrt() if normalise else token
        s = 127 / float(u.detach().abs().max())
        tokens.append(u)
        codes.append(torch.tensor([min(127, max(-128, rounded(v * s))) / s for v in u.tolist()], dtype=torch.float64))
    return torch.stack(tokens), torch.stack(codes)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("scale", "blend"), [("median", 0.0), ("mean", 0.5)])
def test_it_follows_its_lines(scale, blend, normalise):
    options = {"scale": scale, "blend": blend, "normalise": normalise}
    model = start("bitnet-1.58", None, **options)
    W, adam, losses = drawn(), PlainAdam(), []
    for step, (x, y) in enumerate(batches(), 1):
        share = min(1.0, (step - 1) / (blend * STEPS)) if blend else 1.0
        x = x.clone().requires_grad_(True)
        u, q = inputs(x, normalise)
        v = u.detach() + share * (q - u.detach())
        T = W + share * (ternary(W, scale) - W)
        residual = v @ T.T - y
        losses.append(float(residual.square().mean()))
        W = W - adam.step(2.0 / residual.numel() * residual.T @ v)
    assert run(model, Structure.of("bitnet-1.58", None, options)) == pytest.approx(losses, rel=1e-8)
    close(model.layer.terms["ternary"].term.V, W, 1e-7)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_gradient_of_the_inputs_is_that_of_the_normalised_ones(normalise):
    layer = start("bitnet-1.58", None, normalise=normalise).layer.train()
    x, g = batches()[0][0].clone().requires_grad_(True), torch.randn(40, OUT, dtype=torch.float64)
    (found,) = torch.autograd.grad((layer(x) * g).sum(), x)
    u, _ = inputs(x, normalise)
    (wanted,) = torch.autograd.grad((u * (g @ layer.terms["ternary"].term.dense().detach())).sum(), x)
    close(found, wanted, 1e-12)


def test_the_gradient_of_the_latents_is_that_of_the_weight_and_blend_goes_from_the_layer_to_codes():
    W, x = drawn().float(), batches()[0][0].float()
    term = TernaryLatent.from_matrix(W).train()
    y = term(x)
    (found,) = torch.autograd.grad(y.square().sum(), term.V)
    assert torch.equal(found, (2 * y.detach()).T @ x)
    assert set(term.dense().detach().unique().tolist()) == {-float(g := W.abs().median()), 0.0, float(g)}
    term.blend.zero_()
    assert torch.equal(term(x), x @ W.T) and torch.equal(term.dense(), W)
    assert torch.equal(term.eval().dense(), term.finished().dense()), "evaluation is what is left"


def test_inputs_are_not_rounded_at_a_blend_of_none():
    x = batches()[0][0].float()
    term = RoundedInputs.of(TernaryLatent.from_matrix(drawn().float()), normalise=False).train()
    term.term.blend.zero_()
    torch.testing.assert_close(term(x), x @ drawn().float().T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(term.eval()(x), x @ drawn().float().T, rtol=1e-2, atol=1e-2)


def test_inputs_may_be_normalised_alone():
    x = batches()[0][0].float()
    term = RoundedInputs.of(Ternary.from_matrix(drawn().float()), None)
    torch.testing.assert_close(term(x), x / x.square().mean(-1, keepdim=True).sqrt() @ term.term.dense().T)


@pytest.mark.parametrize(("scale", "zeros"), [("mean", 0.310), ("median", 0.264)])
def test_the_share_of_zeros_of_a_normal_weight(scale, zeros):
    W = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    found = to_trits(W, scale_of(W, scale))
    assert float((found == 0).float().mean()) == pytest.approx(zeros, abs=0.01)
    assert torch.equal(found, to_trits(7 * W, scale_of(7 * W, scale)))
    assert float(scale_of(7 * W, scale)) == pytest.approx(7 * float(scale_of(W, scale)))


@pytest.mark.parametrize("count", [1, 4, 5, 6, 96])
def test_trits_come_back_from_their_bytes(count):
    trits = torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(count))
    packed = packed_trits(trits)
    assert packed.dtype == torch.uint8 and packed.shape == (trits_size(count),) == (-(-count // 5),)
    assert torch.equal(trits_of(packed, count), trits.to(torch.int8))
    digits = [int(t) + 1 for t in trits[:5]] + [1] * (5 - min(5, count))
    assert int(packed[0]) == sum(d * 3 ** (4 - i) for i, d in enumerate(digits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_numbers_give_what_the_rounded_ones_give(dtype):
    """int8 times ternary, added up in int32, against the product that training takes."""
    x = batches()[0][0].to(dtype)
    term = RoundedInputs.of(TernaryLatent.from_matrix(drawn().to(dtype))).eval()
    u = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    s = 127 / u.abs().amax(-1, keepdim=True)
    q, t = (u * s).round().to(torch.int32), term.term.finished().trits().to(torch.int32)
    g = drawn().to(dtype).float().abs().median()
    whole = (q @ t.T).float() * g / s
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(term(x).float(), whole, **near)


def test_bytes_are_five_weights_each_and_a_scale():
    assert Ternary.from_matrix(drawn().float()).nbytes == -(-OUT * IN // 5) + 4


def tiny(**options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = restructure(LlamaForCausalLM(config), "bitnet-1.58", **options)
    finish(model, Structure.of("bitnet-1.58", None, options))
    return model.eval()


def test_no_token_sees_a_later_one():
    model, ids = tiny(), torch.arange(24).view(1, -1)
    other = ids.clone()
    other[0, 20:] += 7
    with torch.no_grad():
        one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, :20], two[:, :20]) and not torch.allclose(one[:, 20:], two[:, 20:])


def test_without_rounded_inputs_it_is_a_matrix_for_merging_and_for_integer_formats(tmp_path):
    model, ids = tiny(**PLAIN), torch.arange(24).view(1, -1)
    layers = [m for m in model.modules() if isinstance(m, SumLinear)]
    assert layers and all(set(layer.terms) == {"ternary"} for layer in layers)
    assert all(type(layer.terms["ternary"]) is Ternary for layer in layers)
    done = export(model, tmp_path / "served", "compressed-tensors", dtype=torch.float32)
    assert done["coded"] == len(layers)
    with torch.no_grad():
        before = model(ids).logits
        merge(model)
        torch.testing.assert_close(model(ids).logits, before)


def test_with_rounded_inputs_merging_and_exporting_say_that_it_is_none(tmp_path):
    for act in (merge, lambda model: export(model, tmp_path / "out", "hf")):
        with pytest.raises(WeftError, match="rounds its inputs"):
            act(tiny())
    assert not (tmp_path / "out").exists()


def test_a_given_model_has_defaults_of_its_own():
    fresh, given = (Structure.of("bitnet-1.58", given=given).options for given in (False, True))
    assert fresh["normalise"] and not given["normalise"] and (fresh["blend"], given["blend"]) == (0.0, 0.5)
    assert Structure.of("bitnet-1.58", None, {"blend": 0.1}, given=True).options["blend"] == 0.1


def test_rounding_comes_over_its_share_of_the_run():
    model = restructure(One(drawn().float()), "bitnet-1.58", blend=0.5)
    rule = Blend(0.5)
    rule.start(model, steps=20)
    assert [rule.at(step) for step in (1, 6, 11, 20)] == [0.0, 0.5, 1.0, 1.0]
    rule.after_step(model, 6)
    assert float(model.layer.terms["ternary"].term.blend) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": "max"}, "no scale of ternary weights called 'max'"),
        ({"activations": 16}, "rounded to 2 to 8 bits, not to 16"),
        ({"blend": 1.0}, "blend is 1.0: give the share of the run"),
    ],
)
def test_wrong_options_are_sentences(options, sentence):
    structure = Structure.of("bitnet-1.58", None, options)
    with pytest.raises(WeftError, match=sentence):
        structure.rules(restructure(One(drawn().float()), structure), 0)
