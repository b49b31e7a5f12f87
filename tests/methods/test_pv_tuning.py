"""pv-tuning against its lines in fp64, on toy problems, and as a verb: sizes stay, few codes move, runs resume."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.methods.one_layer import close
from weft.errors import WeftError
from weft.memory import lean
from weft.methods import METHODS
from weft.rules import Rule
from weft.rules.code_steps import CodeSteps
from weft.runs.loading import load_tokenizer
from weft.terms import IntegerCode, SumLinear, TunedCode
from weft.terms.layers import linear_layers
from weft.terms.put import put
from weft.testing_adapters import tiny_llama
from weft.testing_rules import PROPERTIES, check_rule
from weft.verbs.finetune import run
from weft.verbs.fresh import Structure, restructure

OUT, IN, GROUP = 6, 16, 8
PV = {"code_lr": 0.3, "tau": 0.1, "decay": 1.0, "trust": None, "beta": 0.95}


class Coded(nn.Module):
    """One layer in two bits, in fp64."""

    def __init__(self, seed: int = 0, bits: int = 2) -> None:
        super().__init__()
        W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
        code = IntegerCode.from_matrix(W, bits, GROUP, scale_dtype=torch.float32)
        self.layer = SumLinear({"code": TunedCode.from_code(code)}).double()
        self.term.decode()

    @property
    def term(self) -> TunedCode:
        term = self.layer.terms["code"]
        assert isinstance(term, TunedCode)
        return term

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def rule_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, **options: object) -> Rule:
    rule = CodeSteps(**{**PV, **options})
    rule.bind(optimizer)
    rule.start(model, steps=steps)
    return rule


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, IN, generator=draw, dtype=torch.float64)
    return x, x @ torch.randn(IN, OUT, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("decay", "trust"), [(1.0, None), (0.0, None), (0.5, 0.05)])
def test_it_follows_its_lines(decay, trust):
    """Entry by entry: SGD on scales, targets by their own second moment, the top share re-encoded."""
    model = Coded()
    optimizer = torch.optim.SGD([model.term.scales, model.term.W], lr=1e-3)
    rule = rule_of(model, optimizer, decay=decay, trust=trust)
    codes, zeros = model.term.codes.double(), model.term.zeros.double().repeat_interleave(GROUP, 1)
    scales = model.term.scales.detach().clone()
    v, unspent = torch.zeros(OUT, IN, dtype=torch.float64), None
    spread = lambda s: s.float().double().repeat_interleave(GROUP, 1)  # noqa: E731  stored in 32 bits
    for step in range(1, 11):
        x, y = data(step)
        W = (codes - zeros) * spread(scales)
        G = 2 * (x @ W.T - y).T @ x / y.numel()
        rule.update(model, optimizer, (model(x) - y).square().mean(), step)
        D = W if unspent is None else unspent
        scales = (scales - 1e-3 * (G * (codes - zeros)).view(OUT, -1, GROUP).sum(-1)).clamp(min=0)
        v = 0.95 * v + 0.05 * G * G
        u = G / (v.sqrt() + 1e-6)
        target = D - 0.3 * math.sqrt(1 - 0.95**step) * D.norm() / u.norm() * u
        W = (codes - zeros) * spread(scales)
        order = sorted(((float((target - W)[i, j].abs()), i, j) for i in range(OUT) for j in range(IN)), reverse=True)
        total = 0.0
        for _, i, j in order[: math.ceil(0.1 * OUT * IN)]:
            scale = float(spread(scales)[i, j])
            found = min(3, max(0, round(float(target[i, j]) / scale + float(zeros[i, j]))))
            total += (found - float(codes[i, j])) ** 2 * scale**2
            codes[i, j] = found
            if trust is not None and math.sqrt(total) > trust * float(W.norm()):
                break
        W = (codes - zeros) * spread(scales)
        unspent = target + decay * (W - target)
        assert torch.equal(model.term.codes.double(), codes), f"other codes in step {step}"
        close(model.term.scales, scales, 1e-9)
        close(model.term.W, W, 1e-6)
    assert rule.changed > 0


def test_few_codes_change_a_step_and_those_of_no_share_none():
    for tau, most in ((0.1, math.ceil(0.1 * OUT * IN)), (0.0, 0)):
        model = Coded()
        optimizer = torch.optim.SGD([model.term.scales], lr=1e-3)
        rule, moved = rule_of(model, optimizer, tau=tau, code_lr=3.0), 0
        for step in range(1, 6):
            before = model.term.codes.clone()
            x, y = data(step)
            rule.update(model, optimizer, (model(x) - y).square().mean(), step)
            now = int((model.term.codes != before).sum())
            assert now <= most
            moved += now
        assert (moved > 0) == (tau > 0)


def test_all_codes_and_a_large_rate_are_a_new_rounding_of_the_gradient_step():
    model, (x, y) = Coded(), data()
    rule = rule_of(model, torch.optim.SGD([model.term.scales], lr=0.0), tau=1.0, code_lr=2.0, beta=0.0)
    W, optimizer = model.term.W.detach().clone(), torch.optim.SGD([model.term.scales], lr=0.0)
    G = 2 * (x @ W.T - y).T @ x / y.numel()
    rule.update(model, optimizer, (model(x) - y).square().mean(), 1)
    u = G / (G.abs() + 1e-6)
    assert torch.equal(model.term.codes, model.term.nearest(W - 2.0 * W.norm() / u.norm() * u))


def test_with_every_code_and_nothing_forgotten_it_is_straight_through_training():
    model = Coded()
    optimizer = torch.optim.SGD([model.term.scales], lr=0.0)
    rule = rule_of(model, optimizer, tau=1.0, decay=0.0, code_lr=0.05)
    latent, v = model.term.W.detach().clone(), torch.zeros(OUT, IN, dtype=torch.float64)
    for step in range(1, 16):
        x, y = data(step)
        W = model.term.W.detach()
        assert torch.equal(model.term.codes, model.term.nearest(latent))
        G = 2 * (x @ W.T - y).T @ x / y.numel()
        v = 0.95 * v + 0.05 * G * G
        u = G / (v.sqrt() + 1e-6)
        latent = latent - 0.05 * math.sqrt(1 - 0.95**step) * latent.norm() / u.norm() * u
        rule.update(model, optimizer, (model(x) - y).square().mean(), step)
    assert rule.changed > 0


def test_of_a_quadratic_with_a_step_of_its_curvature_no_step_raises_the_loss():
    """The majoriser: the nearest code to W - G / L is never worse than the old one, for every subset."""
    x, y = data()
    L = float(torch.linalg.eigvalsh(2 * x.T @ x / y.numel()).max())
    for tau in (0.02, 0.3, 1.0):
        model = Coded()
        optimizer = torch.optim.SGD([model.term.scales], lr=0.0)
        rule = rule_of(model, optimizer, tau=tau)
        rule._update = lambda i, G, D, step: G / L
        losses = []
        for step in range(1, 15):
            loss = (model(x) - y).square().mean()
            losses.append(float(loss.detach()))
            rule.update(model, optimizer, loss, step)
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
        assert losses[-1] < losses[0]


def test_a_term_in_training_is_the_code_before_and_after():
    for symmetric in (False, True):
        W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        code = IntegerCode.from_matrix(W, 3, 5, symmetric=symmetric)
        term = TunedCode.from_code(code)
        back = term.finished()
        assert torch.equal(term.dense(), code.dense()) and back.spec() == code.spec() and back.nbytes == code.nbytes
        assert all(torch.equal(t, back.state_dict()[name]) for name, t in code.state_dict().items())


def coded(model: nn.Module) -> nn.Module:
    """Every linear layer in two bits."""
    for name, layer in linear_layers(model).items():
        put(model, name, {"base": IntegerCode.from_matrix(layer.weight.detach(), 2, 8)})
    return model


def coded_llama() -> nn.Module:
    return coded(tiny_llama())


def structure(**options: object) -> Structure:
    return Structure(METHODS["pv-tuning"], None, METHODS["pv-tuning"].options(options))


@pytest.mark.parametrize("property_", PROPERTIES)
def test_its_rule_conforms(property_):
    def start() -> tuple[nn.Module, dict[str, dict[str, nn.Module]]]:
        model = restructure(coded_llama(), structure())
        METHODS["pv-tuning"].freeze(model)
        return model, {n: dict(m.terms.items()) for n, m in model.named_modules() if isinstance(m, SumLinear)}

    check_rule(lambda: CodeSteps(**PV), start, property_)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A coded model's directory with a tokenizer, and a text."""
    place, tokenizer = tmp_path_factory.mktemp("coded"), load_tokenizer("pico")
    config = copy.deepcopy(tiny_llama().config)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(place / "dense")
    coded(model).save_pretrained(place / "model")
    for name in ("dense", "model"):
        tokenizer.save_pretrained(place / name)
    (place / "text.txt").write_text("".join(f"def f{i}(a):\n    return a + {i}\n\n\n" for i in range(200)))
    return place / "model", place / "text.txt"


SETTINGS = {
    "method": "pv-tuning", "steps": 6, "lr": 1e-3, "window": 32, "batch": 2, "log_every": 1, "device": "cpu",
    "save_every": 3, "code_lr": 0.3, "decay": 0.5,
}  # fmt: skip


def test_the_verb_tunes_codes_with_a_teacher_and_stores_as_many_bytes(made, tmp_path):
    model, text = made
    done = run(str(model), tmp_path / "out", data=text, teacher=str(model.parent / "dense"), **SETTINGS)
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (model, tmp_path / "out"))
    assert {n: t.shape for n, t in before.state_dict().items()} == {n: t.shape for n, t in after.state_dict().items()}
    mine, theirs = ({n: m for n, m in found.named_modules() if isinstance(m, IntegerCode)} for found in (after, before))
    moved = sum(int((mine[n].integer_codes() != theirs[n].integer_codes()).sum()) for n in theirs)
    assert mine.keys() == theirs.keys() and moved > 0 and done["loss_last"] < done["loss_first"]
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)


def test_an_interrupted_run_ends_on_the_same_bytes(made, tmp_path, monkeypatch):
    model, text = made
    run(str(model), tmp_path / "whole", data=text, **SETTINGS)
    original, calls = CodeSteps.after_step, []

    def crash(self: CodeSteps, model: nn.Module, step: int) -> None:
        calls.append(step)
        if step == 5:
            raise RuntimeError("power cut")
        original(self, model, step)

    monkeypatch.setattr(CodeSteps, "after_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(str(model), tmp_path / "again", data=text, **SETTINGS)
    monkeypatch.setattr(CodeSteps, "after_step", original)
    run(str(model), tmp_path / "again", data=text, **SETTINGS)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "again"))
    assert calls == [1, 2, 3, 4, 5] and all(torch.equal(t, other[n]) for n, t in one.items())


def test_lean_steps_give_the_same_gradients():
    ids = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for saver in (False, True):
        model = restructure(coded_llama(), structure()).train()
        (lean(model) if saver else model)(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(".W" in n for n in found[0])
    assert all(torch.allclose(g, found[1][n], rtol=1e-3, atol=1e-6) for n, g in found[0].items())


def test_what_cannot_be_is_said(made, tmp_path):
    _, text = made
    with pytest.raises(
        WeftError, match="finds nothing to train in this model; compress it first .*Integer codes, as of rtn"
    ):
        run("pico", tmp_path / "no", data=text, **SETTINGS)
    for options, sentence in (
        ({"tau": 1.5}, "tau 1.5"),
        ({"trust": 0.0}, "trust is 0.0"),
        ({"code_lr": 0.0}, "code_lr"),
    ):
        with pytest.raises(WeftError, match=sentence):
            CodeSteps(**{**PV, **options})


def test_a_run_in_which_no_code_changes_says_so():
    model, (x, y) = Coded(), data()
    optimizer = torch.optim.SGD([model.term.scales], lr=0.0)
    rule = rule_of(model, optimizer, steps=1, code_lr=1e-6)
    with pytest.warns(UserWarning, match="No code has changed in 1 steps.*raise code_lr above 1e-06"):
        rule.update(model, optimizer, (model(x) - y).square().mean(), 1)
