"""acm: learners that are added up, gates that choose how many, and the phases of their training."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from tests.methods.one_layer import One
from weft.errors import WeftError
from weft.methods import METHODS
from weft.methods.base import Site
from weft.rules.gate_phases import GatePhases, share_run
from weft.seeds import generator
from weft.terms import Dense, GatedLearners, LowRank, SumLinear
from weft.terms.gated_learners import at_least
from weft.testing_adapters import task, tiny_llama
from weft.verbs.compress import compress
from weft.verbs.fresh import Structure, restructure

OPTIONS = {"learners": 3, "hidden": 8, "capacity": 1.0}


def example() -> GatedLearners:
    return GatedLearners.example(torch.Generator().manual_seed(0)).double()


def tokens(count: int = 40, width: int = 8) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_token_gets_the_sum_of_the_learners_that_its_gate_chose() -> None:
    term, x = example(), tokens()
    chosen = term.gate(x).argmax(-1)
    assert {0, 2, 3} <= set(chosen.tolist())
    expected = []
    for row, k in zip(x, chosen.tolist(), strict=True):
        y = torch.zeros(12, dtype=torch.float64)
        for n in range(k):
            y = y + term.B[:, 2 * n : 2 * n + 2] @ (term.A[2 * n : 2 * n + 2] @ row)
        expected.append(y)
    torch.testing.assert_close(term(x), torch.stack(expected))
    run = (chosen.unsqueeze(1) >= term.steps(x)).double()
    torch.testing.assert_close(term.masked(x, run), torch.stack(expected))
    term.runs = "all"
    torch.testing.assert_close(term(x), x @ term.A.T @ term.B.T)
    full = ((x @ term.A.T @ term.B.T).square()).sum(1)
    for k in range(4):
        part = x @ term.A[2 * k :].T @ term.B[:, 2 * k :].T
        torch.testing.assert_close(term.lacking(x)[:, k], part.square().sum(1) / full)


def test_no_gradient_reaches_learners_beyond_the_choice() -> None:
    term, x = example(), tokens()
    with torch.no_grad():
        term.w2.zero_()
        term.b2.copy_(torch.tensor([0.0, 0, 50, 0]))  # two learners, whatever is drawn
    term.runs = "drawn"
    term(x).sum().backward()
    assert term.A.grad is not None and term.B.grad is not None and term.b2.grad is not None
    assert bool(term.A.grad[:4].any()) and not term.A.grad[4:].any() and not term.B.grad[:, 4:].any()


def test_draws_follow_the_gate_and_their_gradient_is_the_soft_one_s() -> None:
    term = example()
    term.runs = "drawn"
    x = tokens(1).expand(4000, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        term.A.fill_(0)
        term.B.fill_(0)
        for n in range(3):
            term.A[2 * n] = 1 / x[0].sum()
            term.B[:, 2 * n] = 1.0
        counts = torch.bincount(term(x)[:, 0].round().long(), minlength=4) / 4000
    expected = term.gate(x[0]).softmax(-1).detach()
    torch.testing.assert_close(counts.double(), expected, atol=0.05, rtol=0)


def test_the_leading_components_are_the_learners_of_a_layer() -> None:
    method, W = METHODS["acm"], torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    site = Site("layer", {"base": Dense.from_matrix(W)}, None, None, {}, generator(0, "acm"))
    assert method.split is not None
    term = method.split(site, **OPTIONS).terms["base"]
    assert term.rank == 12 * 16 // 28 // 3 * 3
    s = torch.linalg.svdvals(W)
    for k in range(term.learners + 1):
        r = k * term.rank // term.learners
        left = torch.linalg.norm(W - (term.B[:, :r] @ term.A[:r]).detach())
        assert float(left) == pytest.approx(float(s[r:].norm()), rel=1e-4)
    factors = LowRank.from_factors(torch.randn(12, 7), torch.randn(7, 16))
    kept = method.split(Site("layer", {"a": factors}, None, None, {}, generator(0, "b")), **OPTIONS).terms["base"]
    torch.testing.assert_close(kept.B @ kept.A, factors.B @ factors.A)
    with pytest.raises(WeftError, match="learners is 0"):
        method.split(site, learners=0, hidden=8, capacity=1.0)


@torch.no_grad()
@pytest.mark.parametrize("learners", [1, 3, 4])
def test_no_component_of_the_model_s_factors_is_lost(learners: int) -> None:
    """A rank of 7 in parts of equal size: all learners give what the factors gave."""
    draw = torch.Generator().manual_seed(0)
    factors = LowRank.from_factors(torch.randn(12, 7, generator=draw), torch.randn(7, 10, generator=draw))
    site = Site("layer", {"base": factors}, None, None, {}, generator(0, "layer"), torch.float32)
    term = METHODS["acm"].split(site, **OPTIONS | {"learners": learners}).terms["base"]
    assert isinstance(term, GatedLearners) and term.rank == math.ceil(7 / learners) * learners
    x = tokens(width=10).float()
    torch.testing.assert_close(term(x), factors(x))


def test_gates_are_taught_the_first_prefix_that_is_near_enough_and_then_keep_the_budget() -> None:
    model = One(torch.zeros(12, 8))
    term = example()
    model.layer = SumLinear({"base": term})
    rule = GatePhases(target=0.5, gates=0.5, tolerance=0.2, weight=2.0, entropy=0.3, diversity=0.7)
    rule.start(model.train(), steps=4)
    x = tokens()
    assert rule.penalty(model) is None
    model(x)
    needed = [next(k for k in range(4) if float(term.lacking(row)[k]) <= 0.2) for row in x]
    loss = -sum(float(term.gate(row).log_softmax(-1)[k]) for row, k in zip(x, needed, strict=True)) / len(x)
    penalty = rule.penalty(model)
    assert penalty is not None and float(penalty) == pytest.approx(loss, rel=1e-5)
    assert len(set(needed)) > 1 and term.runs == "all"
    rule.open(3)
    assert term.runs == "drawn"
    model(x.view(2, 20, -1))
    p = term.gate(x).softmax(-1)
    cost = sum(float(p[:, k].mean()) * k / 3 for k in range(4))
    mean = p.mean(0).tolist()
    entropy = -sum(q * math.log(q) for q in mean) / math.log(4)
    effort = [sum(float(q) * k for k, q in enumerate(row)) / 4 for row in p]
    first, second = (sum(part) / len(part) for part in (effort[:20], effort[20:]))
    apart = 2 * 2 * abs(first - second) / 4  # of the four pairs of two sequences, two are of different ones
    assert apart > 0
    expected = 2.0 * abs(cost - 0.5) - 0.3 * entropy - 0.7 * apart
    penalty = rule.penalty(model)
    assert penalty is not None and float(penalty) == pytest.approx(expected, rel=1e-4)
    assert float(share_run({term: p})) == pytest.approx(cost)
    torch.testing.assert_close(at_least(p)[:, 2], p[:, 3])


def test_learners_stay_while_gates_are_taught_and_a_run_too_short_for_both_says_so() -> None:
    model = One(torch.zeros(12, 8))
    term = example()
    model.layer = SumLinear({"base": term})
    rule = GatePhases(target=0.5, gates=0.2, tolerance=0.2, weight=2.0, entropy=0.3, diversity=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule.start(model.train(), steps=4)
    before = {name: p.detach().clone() for name, p in term.named_parameters()}
    for step in (1, 2):
        rule.update(model, optimizer, model(tokens().view(2, 20, -1)).square().mean(), step)
        moved = {name for name, p in term.named_parameters() if not torch.equal(p, before[name])}
        assert moved & {"A", "B"} == (set() if step == 1 else {"A", "B"}) and moved >= {"w2", "b2"}
    rule.share = 0.9
    with pytest.warns(UserWarning, match="The last batch ran 0.90 of the learners and the target is 0.5: train longer"):
        rule.after_step(model, 4)
    with pytest.warns(UserWarning, match="The training of the gates is 1 steps and the run has 1"):
        rule.start(model, steps=1)


def test_padding_is_no_part_of_it_and_training_brings_the_share_to_its_target() -> None:
    model, method = tiny_llama(), METHODS["acm"]
    compress(model, "svd", budget=0.8)
    options = method.options({"learners": 2, "hidden": 8, "gates": 0.2, "target": 0.5, "weight": 5.0})
    restructure(model, Structure(method, None, options), 0)
    trained = method.freeze(model)
    terms = [module for module in model.modules() if isinstance(module, GatedLearners)]
    assert len(terms) == 7 and all(term.rank % 2 == 0 for term in terms)
    names = ("target", "gates", "tolerance", "weight", "entropy", "diversity")
    rule = GatePhases(**{name: options[name] for name in names})
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    rule.start(model.train(), steps=30)
    batch = dict(task()[0])
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][:, 10:] = 0
    torch.manual_seed(0)
    for step in range(1, 31):
        warnings.simplefilter("error")  # it ends near its target
        loss = model(**batch).loss
        assert all(len(x) == 40 for x in rule.seen.values()) and len(rule.seen) == 7
        rule.update(model, optimizer, loss, step)
    model(**batch)
    share = float(share_run({term: term.gate(x).softmax(-1) for term, x in rule.seen.items()}).detach())
    assert share == pytest.approx(0.5, abs=0.12)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(**batch).logits).all()
