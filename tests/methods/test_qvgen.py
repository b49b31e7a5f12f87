"""qvgen against its lines in fp64: the learned step, the rank that goes away, and what is left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.methods.one_layer import One, close
from tests.methods.test_structures import IN, OUT, PlainAdam, batches, drawn
from weft.errors import WeftError
from weft.methods import METHODS
from weft.rules import Rules
from weft.rules.rank_decay import RankDecay
from weft.runs.loading import load_tokenizer
from weft.terms import AidedCode, IntegerCode, RoundedInputs, SumLinear
from weft.testing_adapters import tiny_llama
from weft.testing_rules import PROPERTIES, check_rule
from weft.verbs.finetune import run
from weft.verbs.fresh import Structure, finish, restructure

BITS, RANK, STEPS, RATE = 3, 6, 20, 1e-2
LOW, HIGH = -4, 3


def structure(**options: object) -> Structure:
    method = METHODS["qvgen"]
    return Structure(method, None, method.options({"bits": BITS, "auxiliary": RANK, **options}))


def made() -> One:
    """One layer whose steps are stored in 32 bits, in fp64."""
    model = One(drawn().float())
    term = AidedCode.from_matrix(drawn().float(), BITS, RANK, "float32")
    model.layer = SumLinear({"base": term}).double()
    return model


def quantised(V: Tensor, s: Tensor) -> Tensor:
    return (V / s[:, None]).round().clamp(LOW, HIGH) * s[:, None]


@pytest.mark.parametrize("decay", ["cosine", "straight"])
def test_it_follows_its_lines(decay):
    """Rank 6 goes in three phases of six steps: 6, 3, 1, none; Adam of each tensor, its moments new after each cut."""
    model = made()
    term = model.layer.terms["base"]
    parameters = [term.V, term.step, term.B, term.A]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    rule = RankDecay(RANK, decay)
    rule.bind(optimizer)
    rule.start(model.train(), steps=STEPS)
    V, s, B, A = (p.detach().clone() for p in parameters)
    adams, ranks, period = [PlainAdam() for _ in parameters], [6, 3, 1, 0], 6
    for step, (x, y) in enumerate(batches(), 1):
        phase, t = divmod(step - 1, period)
        R = ranks[phase]
        share = (1 + math.cos(math.pi * t / period)) / 2 if decay == "cosine" else 1 - t / period
        gate = torch.tensor([1.0 if j < R // 2 else share if j < R else 0.0 for j in range(RANK)], dtype=torch.float64)
        stored = s.float().double().clamp(min=2**-14)  # a row whose step has come to nothing
        residual = x @ (quantised(V, stored) + B @ gate.diag() @ A).T - y
        loss = (model(x) - y).square().mean()
        assert float(loss.detach()) == pytest.approx(float(residual.square().mean()), rel=1e-7)
        rule.update(model, optimizer, loss, step)
        G, v = 2 / residual.numel() * residual.T @ x, V / stored[:, None]
        within = (v >= LOW) & (v <= HIGH)
        by_step = torch.where(within, v.round() - v, v.clamp(LOW, HIGH))
        gradients = [G * within, (G * by_step).sum(1) / math.sqrt(IN * HIGH), G @ A.T * gate, gate[:, None] * (B.T @ G)]
        V, s, B, A = (p - adam.step(g) for p, adam, g in zip((V, s, B, A), adams, gradients, strict=True))
        if step % period == 0:
            kept = ranks[phase + 1]
            U, values, Vh = torch.linalg.svd(B[:, :kept] @ A[:kept], full_matrices=False)
            B, A = torch.zeros_like(B), torch.zeros_like(A)
            B[:, :kept], A[:kept] = U[:, :kept] * values[:kept].sqrt(), values[:kept].sqrt()[:, None] * Vh[:kept]
            adams[2:] = [PlainAdam(), PlainAdam()]
            flip = torch.ones(RANK, dtype=torch.float64)
            flip[:kept] = (B[:, :kept] * term.B[:, :kept]).sum(0).sign()  # singular vectors are known but for a sign
            B, A = B * flip, A * flip[:, None]
        for one, other in zip(parameters, (V, s, B, A), strict=True):
            close(one, other, 1e-6)
    assert not term.B.any() and not term.A.any() and not term.gate.any()


def test_it_starts_with_the_tail_of_the_error_s_spectrum():
    for rank in (1, RANK, OUT):
        term = AidedCode.from_matrix(drawn().float(), BITS, rank).train()
        error = (term.dense() - drawn().float()).detach()
        s = torch.linalg.svdvals(term.eval().dense().detach() - drawn().float())
        assert float(error.square().sum()) == pytest.approx(float(s[rank:].square().sum()), abs=1e-6)


def test_a_cut_changes_nothing_and_orders_what_is_left():
    model = made().train()
    term, rule = model.layer.terms["base"], RankDecay(RANK, "cosine")
    rule.start(model, steps=18)
    with torch.no_grad():
        term.B.copy_(torch.randn(OUT, RANK, generator=torch.Generator().manual_seed(5)))
        term.gate[3:] = 0.0  # what a phase comes down to
        before = term.dense().clone()
        rule._cut(term, 3)
    torch.testing.assert_close(term.dense(), before, rtol=1e-9, atol=1e-9)
    grams = term.B[:, :3].T @ term.B[:, :3], term.A[:3] @ term.A[:3].T
    torch.testing.assert_close(*grams, rtol=1e-7, atol=1e-7)
    values = grams[0].diag()
    torch.testing.assert_close(grams[0], values.diag(), rtol=1e-7, atol=1e-7)
    assert bool((values[1:] <= values[:-1]).all()) and float(values.min()) > 0


@pytest.mark.parametrize(("rank", "ranks"), [(32, [32, 16, 8, 4, 2, 1, 0]), (5, [5, 2, 1, 0]), (1, [1, 0])])
def test_ranks_and_phases(rank, ranks):
    rule, model = RankDecay(rank, "cosine"), One(drawn().float())
    model.layer = SumLinear({"base": AidedCode.from_matrix(drawn().float(), 3, rank)})
    rule.start(model, steps=2000)
    assert rule.period == 2000 // (len(ranks) - 1)
    assert [rule.at(1 + i * rule.period) for i in range(len(ranks))] == [(r, 1.0) for r in ranks]
    assert 0 < rule.at(rule.period)[1] < 1e-3


def test_what_is_left_is_the_plain_code_bit_for_bit_and_evaluation_is_it_at_all_times():
    for dtype in (torch.float32, torch.bfloat16):
        term = AidedCode.from_matrix(
            drawn().to(dtype), BITS, RANK, "bfloat16" if dtype == torch.bfloat16 else "float16"
        )
        left = term.finished()
        assert type(left) is IntegerCode and left.bits == BITS and left.symmetric
        assert torch.equal(left.dense(), term.eval().dense())
        assert not torch.equal(term.train().dense(), left.dense())


@pytest.mark.parametrize("property_", PROPERTIES)
def test_its_rule_conforms(property_):
    def start() -> tuple[nn.Module, dict[str, dict[str, nn.Module]]]:
        model = restructure(tiny_llama(), structure())
        METHODS["qvgen"].freeze(model)
        return model, {n: dict(m.terms.items()) for n, m in model.named_modules() if isinstance(m, SumLinear)}

    check_rule(lambda: RankDecay(RANK, "cosine"), start, property_)


@pytest.mark.parametrize("activations", [None, 8])
def test_finishing_leaves_codes_alone(activations):
    model, chosen = tiny_llama(), structure(activations=activations)
    restructure(model, chosen)
    ids = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        finish(model, chosen)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    kinds = {type(t) for m in model.modules() if isinstance(m, SumLinear) for t in m.terms.values()}
    assert kinds == {IntegerCode if activations is None else RoundedInputs}
    assert not any(name.endswith((".A", ".B", ".gate", ".V")) for name in model.state_dict())


def test_the_verb_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    tokenizer, text = load_tokenizer("pico"), tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(a):\n    return a + {i}\n\n\n" for i in range(200)))
    config = tiny_llama().config
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    how = {"method": "qvgen", "bits": 3, "auxiliary": 4, "steps": 7, "lr": 1e-3, "window": 32, "batch": 2, "data": text}
    how |= {"save_every": 3, "log_every": 1, "device": "cpu", "teacher": str(tmp_path / "model")}
    run(str(tmp_path / "model"), tmp_path / "whole", **how)
    original = RankDecay.after_step

    def crash(self: RankDecay, model: nn.Module, step: int) -> None:
        if step == 5:
            raise RuntimeError("power cut")
        original(self, model, step)

    monkeypatch.setattr(RankDecay, "after_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(str(tmp_path / "model"), tmp_path / "again", **how)
    monkeypatch.setattr(RankDecay, "after_step", original)
    run(str(tmp_path / "model"), tmp_path / "again", **how)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "again"))
    assert one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
    assert any(name.endswith(".codes") for name in one)


def test_what_cannot_be_is_said():
    for options, sentence in (
        ((0, "cosine"), "auxiliary is 0"),
        ((4, "steep"), "no fall of the auxiliary rank called"),
    ):
        with pytest.raises(WeftError, match=sentence):
            RankDecay(*options)
    with pytest.raises(WeftError, match="no integer codes of 9 bits"):
        restructure(One(drawn().float()), structure(bits=9))
    model = restructure(One(drawn().float()), structure())
    with pytest.raises(WeftError, match="goes in 3 phases, and the run has 2 steps"):
        Rules([RankDecay(RANK, "cosine")]).start(model, steps=2)
