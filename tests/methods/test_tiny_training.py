"""tiny-training: steps of codes are steps of the weights, nothing else moves or is kept, and bytes stay."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.methods.one_layer import close
from tests.methods.test_pv_tuning import coded, coded_llama
from weft.errors import WeftError
from weft.memory.measure import saved_bytes
from weft.methods import METHODS
from weft.rules.scaled_steps import ScaledSteps
from weft.terms import IntegerCode, SteppedCode, SumLinear
from weft.terms.layers import linear_layers
from weft.testing_adapters import task
from weft.testing_rules import PROPERTIES, check_rule
from weft.verbs.fresh import Structure, finish, restructure

OUT, IN, GROUP, RATE = 6, 16, 4, 0.05
PLACES = torch.tensor([2, 3, 9, 14])


class Coded(nn.Module):
    """One layer in 8 bits, four columns of which are trained, in fp64."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
        code = IntegerCode.from_matrix(W, bits, GROUP, scale_dtype=torch.float32)
        self.layer = SumLinear({"code": SteppedCode.from_code(code, PLACES)}).double()

    @property
    def term(self) -> SteppedCode:
        term = self.layer.terms["code"]
        assert isinstance(term, SteppedCode)
        return term

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def data(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, IN, generator=draw), torch.randn(40, OUT, generator=draw)
    return x.double(), y.double()


def test_a_run_that_changes_next_to_no_code_says_so() -> None:
    for rate, warned in ((1e-6, True), (1.0, False)):
        model, rule = Coded(), ScaledSteps(rate)
        optimizer = torch.optim.SGD([model.term.V], lr=1.0)
        rule.bind(optimizer)
        rule.start(model, steps=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(1, 4):
                x, y = data(step)
                rule.update(model, optimizer, (model(x) - y).square().mean(), step)
        words = [str(w.message) for w in caught if "codes have changed" in str(w.message)]
        assert bool(words) == warned and all("0 of 24 codes have changed in 3 steps" in w for w in words)


@pytest.mark.parametrize("bits", [3, 8])
def test_its_steps_are_those_of_plain_descent_on_the_weights(bits):
    """Weights that keep their fractions, are rounded on the way, and stay where their code is at an end."""
    model = Coded(bits)
    code = model.term.inner
    scale = code.scale_matrix().double().repeat_interleave(GROUP, 1)
    zero = code.zero_points().double().repeat_interleave(GROUP, 1)
    kept, last = code.dense(torch.float64).clone(), 2**bits - 1
    first, moved = code.integer_codes().double(), torch.zeros_like(kept)  # of the weights
    trained = torch.isin(torch.arange(IN), PLACES)
    optimizer = torch.optim.SGD([model.term.V], lr=1.0)
    rule = ScaledSteps(RATE)
    rule.bind(optimizer)
    rule.start(model, steps=15)
    for step in range(1, 16):
        x, y = data(step)
        at = first + moved / scale
        now = torch.where(trained, (at.clamp(0, last).round() - zero) * scale, kept)
        loss = (model(x) - y).square().mean()
        assert float(loss.detach()) == pytest.approx(float((x @ now.T - y).square().mean()), rel=1e-6)
        rule.update(model, optimizer, loss, step)
        G = 2 / y.numel() * (x @ now.T - y).T @ x
        moved -= torch.where(trained & (at >= 0) & (at <= last), RATE * G, 0.0)
        close(model.term.V, (first + moved / scale)[:, PLACES], 1e-6)
    left = model.term.finished().dense(torch.float64)
    rest = [j for j in range(IN) if j not in PLACES.tolist()]
    assert torch.equal(left[:, rest], kept[:, rest]) and not torch.equal(left[:, PLACES], kept[:, PLACES])
    close(left, model.term.dense(torch.float64), 1e-6)


def test_a_scaled_gradient_stands_to_the_codes_as_the_weights_own_to_them():
    """||V - zero|| / ||dL/dV / s^2|| of one scale: what plain steps go by."""
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).double()
    code = IntegerCode.from_matrix(W, 8, None, symmetric=True, scale_dtype=torch.float32)
    code.scales = torch.full_like(code.scale_matrix(), 0.02).view(torch.uint8)
    term = SteppedCode.from_code(code, torch.arange(IN)).double()
    x, y = data(1)
    (x @ term.dense(torch.float64).T - y).square().mean().backward()
    found, now = term.dense(torch.float64).detach(), term.V.detach() - 128
    G = 2 / y.numel() * (x @ found.T - y).T @ x
    ratio = float(now.norm() / (term.V.grad / 0.02**2).norm())
    assert ratio == pytest.approx(float(found.norm() / G.norm()), rel=1e-5)


def test_the_gradient_is_the_slice_of_the_dense_one_and_of_the_inputs_only_that_slice_is_kept():
    model, (x, _) = Coded(), data(2)
    g = torch.randn(40, OUT, dtype=torch.float64)
    x.requires_grad_()
    (model(x) * g).sum().backward()
    close(model.term.V.grad, (g.T @ x)[:, PLACES] * model.term.steps(), 1e-6)
    close(x.grad, g @ model.term.dense(torch.float64), 1e-6)
    kept = saved_bytes(lambda: model(x.detach()).sum(), model.state_dict().values())
    assert kept <= 8 * (40 * len(PLACES) + 4 * OUT * len(PLACES)) < 8 * 40 * IN


def structure(**options: object) -> Structure:
    return Structure(METHODS["tiny-training"], None, METHODS["tiny-training"].options(options))


@pytest.mark.parametrize("property_", PROPERTIES)
def test_its_rule_conforms(property_):
    def start() -> tuple[nn.Module, dict[str, dict[str, nn.Module]]]:
        model = restructure(coded_llama(), structure())
        METHODS["tiny-training"].freeze(model)
        return model, {n: dict(m.terms.items()) for n, m in model.named_modules() if isinstance(m, SumLinear)}

    check_rule(lambda: ScaledSteps(0.5), start, property_)


def test_the_rate_falls_as_the_run_s_does():
    model = Coded()
    optimizer = torch.optim.SGD([model.term.V], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rule, sizes = ScaledSteps(RATE), []
    rule.bind(optimizer)
    rule.start(model, steps=2)
    for step in (1, 2):
        before = model.term.V.detach().clone()
        model.term.V.grad = torch.ones_like(before)
        rule.before_step(model, step)
        optimizer.step()
        rule.after_step(model, step)
        schedule.step()
        sizes.append(float((model.term.V.detach() - before).norm()))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=1e-9)


def test_the_largest_inputs_of_the_last_blocks_and_their_vectors_are_trained_and_bytes_stay():
    config = coded_llama().config
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    model, chosen = coded(LlamaForCausalLM(config)), structure(blocks=2, share=0.25, rate=0.5)
    before = {n: m for n, m in linear_layers(model).items()}
    nbytes = sum(layer.nbytes for layer in before.values())
    code = before["model.layers.2.mlp.up_proj"].terms["base"]
    restructure(model, chosen)
    stepped = {n: m.terms["base"] for n, m in linear_layers(model).items() if type(m.terms["base"]) is SteppedCode}
    assert {n.split(".")[2] for n in stepped} == {"1", "2"} and len(stepped) == 14
    largest = code.dense().norm(dim=0).topk(4).indices
    assert stepped["model.layers.2.mlp.up_proj"].places.tolist() == sorted(largest.tolist())
    named = {id(p): n for n, p in model.named_parameters()}
    trained = {named[id(p)] for p in METHODS["tiny-training"].freeze(model)}
    vectors = {n for n in trained if not n.endswith(".V")}
    assert vectors == {n for n in named.values() if ("layers.1." in n or "layers.2." in n) and "norm" in n}
    rule = ScaledSteps(0.5)
    rule.start(model, steps=20)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(20):
        loss = model(**task()[step % 4]).loss
        losses.append(float(loss.detach()))
        rule.update(model, optimizer, loss, step + 1)
    assert sum(losses[-4:]) < sum(losses[:4])
    with torch.no_grad():
        logits = model(input_ids=task()[0]["input_ids"]).logits
        finish(model, chosen)
        torch.testing.assert_close(model(input_ids=task()[0]["input_ids"]).logits, logits, rtol=1e-4, atol=1e-4)
    assert sum(layer.nbytes for layer in linear_layers(model).values()) == nbytes
    assert all(type(t) is IntegerCode for layer in linear_layers(model).values() for t in layer.terms.values())


def test_what_cannot_be_is_said():
    with pytest.raises(WeftError, match="rate is 0"):
        ScaledSteps(0)
    for options in ({"blocks": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(WeftError, match="give at least 1 block, and a share above 0"):
            restructure(coded_llama(), structure(**options))
    with pytest.raises(WeftError, match="17 trained columns are none of 16"):
        SteppedCode(IN, OUT, Coded().term.inner, 17)
