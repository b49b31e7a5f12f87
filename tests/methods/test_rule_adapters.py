"""The invariants of the adapter methods that are a rule during training, against closed forms and slow loops."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.methods import METHODS, ce_ssl, dylora, sora
from weft.rules import Rules
from weft.rules.freeze_columns import FreezeColumns
from weft.rules.rank_growth import live_components
from weft.terms import Spectral
from weft.terms.adapters import find_adapter
from weft.testing_adapters import adapted, task, tiny_llama, train
from weft.verbs.adapt import adapt, make_optimizer, rules, trainable

OUT, IN, R = 24, 20, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    a, b = a.detach().double(), b.detach().double()
    torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max().clamp(min=1e-30)), rtol=0)


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, W: Tensor | None = None) -> None:
        super().__init__()
        W = drawn(OUT, IN) if W is None else W
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.layer.weight = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def one(method: str, **options: Any) -> tuple[One, Any]:
    """A model of one adapted layer, and its term."""
    model = adapt(One(), method, R, **options)
    return model, model.layer.terms["default"]


def started(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Rules:
    """The model's rules, bound and started."""
    rule = Rules(rules(model))
    if optimizer is not None:
        rule.bind(optimizer)
    rule.start(model, steps=100)
    return rule


def step(model: nn.Module, rule: Rules, optimizer: torch.optim.Optimizer, number: int, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    rule.before_step(model, number)
    optimizer.step()
    rule.after_step(model, number)


def peft_logits(model: nn.Module, directory: Path) -> Tensor:
    """What PEFT computes with the exported adapter."""
    peft = pytest.importorskip("peft")
    save_adapter(model, directory / "adapter", format="peft")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), directory / "adapter").eval()
        found: Tensor = loaded(task()[0]["input_ids"]).logits
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(task()[0]["input_ids"]).logits
    return found


# ---- sora


def test_sora_with_gates_of_one_is_lora() -> None:
    (gated, term), (plain, lora) = one("sora", ones=True, alpha=8.0), one("lora", alpha=8.0)
    assert isinstance(term, Spectral)
    lora.A.data = term.V.data
    term.U.data = lora.B.data = drawn(OUT, R, seed=1)
    x = drawn(5, IN, seed=2)
    close(gated(x), plain(x), 1e-6)


def test_sora_step_without_gradient_is_the_soft_threshold() -> None:
    model, term = one("sora", xi=0.3)
    g = term.s.detach().clone()
    started(model).after_step(model, 1)
    assert torch.equal(term.s, g.sign() * (g.abs() - 0.3).clamp(min=0)) and not torch.equal(term.s, g)


def test_sora_thresholds_at_the_ends() -> None:
    model = adapted(METHODS["sora"], xi=10.0)
    train(model, 2)
    assert torch.equal(logits(model), logits(tiny_llama()))
    free, plain = adapted(METHODS["sora"], xi=0.0), adapted(METHODS["sora"], xi=0.0)
    train(free, 3)
    train(plain, 3, rule=Rules([]))
    pairs = zip(trainable(free).parameters.values(), trainable(plain).parameters.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_sora_closed_component_has_gradient_at_its_gate_alone() -> None:
    model, term = one("sora")
    with torch.no_grad():
        term.U.copy_(drawn(OUT, R, seed=1))
        term.s[1] = 0
    model(drawn(5, IN, seed=2)).square().sum().backward()
    assert not term.V.grad[1].any() and not term.U.grad[:, 1].any() and term.s.grad[1] != 0
    assert term.V.grad[0].any() and term.U.grad[:, 0].any()


def test_sora_closed_component_revives_when_its_step_exceeds_the_threshold() -> None:
    model, term = one("sora", xi=1e-3)
    term.U.data = drawn(OUT, R, seed=1)
    term.s.data[1] = 0
    x = drawn(5, IN, seed=2)
    for lr, alive in ((5e-4, False), (2e-3, True)):
        optimizer = make_optimizer(model, lr)
        step(model, started(model, optimizer), optimizer, 1, model(x).square().sum())
        assert bool(term.s[1]) is alive


def test_sora_prunes_to_the_same_function(tmp_path: Path) -> None:
    model = adapted(METHODS["sora"], xi=0.3, alpha=8.0)
    train(model, 3)
    before = logits(model)
    kept = sora.prune(model)
    terms = {layer: terms["default"] for layer, terms in find_adapter(model).terms.items()}
    assert 0 < sum(kept.values()) < 7 * 4 and all(terms[layer].rank == max(n, 1) for layer, n in kept.items())
    count = sum(max(n, 1) * (terms[layer].in_features + terms[layer].out_features + 1) for layer, n in kept.items())
    assert trainable(model).count == count
    close(logits(model), before, 1e-6)
    close(peft_logits(model, tmp_path), before)
    save_adapter(model, tmp_path / "own", format="weft")
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path / "own")), logits(model))
    with pytest.raises(WeftError, match="only 'sora'"):
        sora.prune(adapt(tiny_llama(), "lora", 2))


def test_sora_exports_open_components_only() -> None:
    _, term = one("sora")
    term.U.data = drawn(OUT, R, seed=1)
    term.s.data[:] = torch.tensor([1.0, 0.0, -2.0, 0.0])
    B, A = term.exact_factors()
    assert A.shape == (2, IN)
    close(B @ A, term.dense(), 1e-6)
    term.s.data.zero_()
    B, A = term.exact_factors()
    assert A.shape == (1, IN) and not (B @ A).any()


def test_sora_fixed_point_is_the_lasso() -> None:
    """With an orthonormal design, proximal SGD ends on the soft-thresholded least squares (threshold: the rate times
    xi)."""
    Q = torch.linalg.qr(drawn(OUT, R))[0]
    model = adapt(One(torch.zeros(OUT, R)), "sora", R, xi=0.3, by_rate=True)
    term = model.layer.terms["default"]
    term.requires_grad_(False)
    term.U.data, term.V.data, term.s.data = Q, torch.eye(R), torch.zeros(R)
    term.s.requires_grad_(True)
    truth = torch.tensor([2.0, -1.0, 0.2, 0.0])
    target = (Q * truth).mT
    optimizer = torch.optim.SGD([term.s], lr=0.2)
    rule = started(model, optimizer)
    for number in range(1, 100):
        step(model, rule, optimizer, number, (model(torch.eye(R)) - target).square().sum() / 2)
    close(term.s, truth.sign() * (truth.abs() - 0.3).clamp(min=0), 1e-4)
    assert (term.s == 0).tolist() == [False, False, True, True]


def test_sora_penalty_is_the_mean_over_all_gates() -> None:
    model = adapted(METHODS["sora"], penalty=10.0)
    gates = torch.cat([term.s.detach() for term in find_adapter(model).all_terms()])
    close(started(model).penalty(model), 10 * gates.abs().mean(), 1e-6)
    assert started(adapted(METHODS["sora"])).penalty(model) is None


def test_sora_decays_no_gate() -> None:
    model = adapted(METHODS["sora"])
    groups = {id(p): g["weight_decay"] for g in weft.parameter_groups(model, 1e-3, 0.1) for p in g["params"]}
    for term in find_adapter(model).all_terms():
        assert (groups[id(term.s)], groups[id(term.U)]) == (0.0, 0.1)


# ---- allora


def moved(method: str, make: Any, steps: int, lr: float, **options: Any) -> tuple[Any, Tensor]:
    """The term, and its B, after some steps of an optimizer on a regression from the same A."""
    model, term = one(method, **options)
    term.A.data = drawn(R, IN, seed=1)
    optimizer = make(trainable(model).parameters.values(), lr=lr)
    rule = started(model, optimizer)
    x, y = drawn(16, IN, seed=2), drawn(16, OUT, seed=3)
    for number in range(1, steps + 1):
        step(model, rule, optimizer, number, (model(x) - y).square().mean())
    return term, term.B.detach()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_allora_first_step_of_B_is_eta_times_that_of_lora(make: Any) -> None:
    """On the step, hence for Adam too; A does not move, for its gradient is zero."""
    (_, B), (_, plain) = moved("allora", make, 1, 1e-2, eta=3.0), moved("lora", make, 1, 1e-2)
    close(B, 3 * plain, 1e-6)


def test_allora_steps_follow_the_current_norms() -> None:
    """Two steps of SGD by hand."""
    term, B = moved("allora", torch.optim.SGD, 2, 0.5)
    x, y, W = drawn(16, IN, seed=2), drawn(16, OUT, seed=3), drawn(OUT, IN)
    A, b = drawn(R, IN, seed=1), torch.zeros(OUT, R)
    for _ in range(2):
        G = 2 * (x @ (W + b @ A).mT - y).mT @ x / (16 * OUT)
        c = [(w.norm(dim=1) + 0.25).rsqrt().unsqueeze(1) for w in (A, b)]
        A, b = A - 0.5 * c[0] * (b.mT @ G), b - 0.5 * c[1] * (G @ A.mT)
    close(B, b)
    close(term.A, A)


@pytest.mark.parametrize("eta", [0.0, -1.0, float("inf")])
def test_allora_refuses_rates_without_a_limit(eta: float) -> None:
    with pytest.raises(WeftError, match="positive, finite|none below zero"):
        adapt(One(), "allora", R, eta=eta)


def test_allora_is_a_lora_to_peft(tmp_path: Path) -> None:
    model = adapted(METHODS["allora"])
    train(model, 3)
    close(peft_logits(model, tmp_path), logits(model))


# ---- dylora


def opened(model: nn.Module) -> list[int]:
    """The open components of each term in the step to come."""
    return [int((term.draw != 0).sum()) for term in find_adapter(model).all_terms()]


def test_dylora_forward_at_every_rank() -> None:
    """alpha / r outside and sqrt(r / b) on each factor, as in the released code, is alpha / b."""
    model, term = one("dylora", alpha=8.0)
    term.B.data = drawn(OUT, R, seed=1)
    rule, x, seen = started(model), drawn(5, IN, seed=2), set()
    W = model.layer.terms["base"].dense()
    for number in range(1, 30):
        (b,) = opened(model)
        seen.add(b)
        root = (R / b) ** 0.5
        delta = 8.0 / R * (root * term.B[:, :b]) @ (root * term.A[:b])
        close(model.train()(x), x @ (W + delta).mT)
        close(model.eval()(x), x @ (W + 8.0 / R * term.B @ term.A).mT)
        rule.after_step(model, number)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("frozen", [True, False])
def test_dylora_which_components_learn(frozen: bool) -> None:
    model, term = one("dylora", frozen=frozen)
    term.B.data = drawn(OUT, R, seed=1)
    rule, optimizer = started(model), torch.optim.SGD(trainable(model).parameters.values(), lr=1e-3)
    for number in range(1, 12):
        (b,) = opened(model)
        before = [p.detach().clone() for p in (term.A, term.B.mT)]
        step(model.train(), rule, optimizer, number, model(drawn(5, IN, seed=number)).square().sum())
        changed = [(p.detach() != old).any(1).tolist() for p, old in zip((term.A, term.B.mT), before, strict=True)]
        expected = [n == b if frozen else n <= b for n in range(1, R + 1)]
        assert changed == [expected, expected]


def test_dylora_draws_one_rank_for_all_layers_by_seed_and_step() -> None:
    model, twin = adapted(METHODS["dylora"]), adapted(METHODS["dylora"])
    rule, again = started(model), started(twin)
    drawn_ranks = []
    for number in range(1, 20):
        assert len(set(opened(model))) == 1 and opened(model) == opened(twin)
        drawn_ranks.append(opened(model)[0])
        rule.before_step(model, number)
        assert opened(model)[0] == drawn_ranks[-1]
        rule.after_step(model, number)
        again.after_step(twin, number)
    other = adapt(tiny_llama(), "dylora", R, seed=4)
    rule, others = started(other), []
    for number in range(1, 20):
        others.append(opened(other)[0])
        rule.after_step(other, number)
    assert others != drawn_ranks


def test_dylora_ranks_are_uniform() -> None:
    model, _ = one("dylora")
    rule, counts = started(model), torch.zeros(R)
    for number in range(2000):
        counts[opened(model)[0] - 1] += 1
        rule.after_step(model, number + 1)
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert chi_square < 16.27  # 0.1 % of 3 degrees of freedom


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_dylora_truncated_is_a_lora_of_that_rank(rank: int, tmp_path: Path) -> None:
    model = adapted(METHODS["dylora"], alpha=8.0)
    train(model, 8)
    whole = logits(model)
    dylora.truncate(model, rank)
    cut = adapt(tiny_llama(), "lora", rank, alpha=8.0)
    for layer, terms in find_adapter(model).terms.items():
        lora = find_adapter(cut).terms[layer]["default"]
        lora.A.data, lora.B.data = terms["default"].A[:rank], terms["default"].B[:, :rank]
    close(logits(model), logits(cut))
    close(peft_logits(model, tmp_path), logits(cut))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    close(logits(dylora.truncate(model, R)), whole, 1e-6)
    with pytest.raises(WeftError, match="from 1 to 4"):
        dylora.truncate(model, 5)
    with pytest.raises(WeftError, match="only 'dylora'"):
        dylora.truncate(cut, 1)


def test_dylora_learns_nested_components() -> None:
    """On a regression the error falls with the rank, though one pair of factors serves all scales alpha / b, and rank 1
    is near its best."""
    U, _, V = torch.linalg.svd(drawn(OUT, IN, seed=3), full_matrices=False)
    target = (U[:, :R] * torch.tensor([8.0, 4.0, 2.0, 1.0])) @ V[:R]
    model = adapt(One(torch.zeros(OUT, IN)), "dylora", R, frozen=False, alpha=float(R))
    optimizer = torch.optim.Adam(trainable(model).parameters.values(), lr=1e-2)
    rule = started(model, optimizer)
    for number in range(1, 600):
        step(model.train(), rule, optimizer, number, (model(torch.eye(IN)) - target.mT).square().sum())
    cut = [(dylora.truncate(model, rank).layer.dense() - target).detach().square().sum() for rank in (1, 2, 3, 4)]
    assert all(a > b for a, b in pairwise(cut)) and 21 < float(cut[0]) < 40


# ---- ce-ssl


def ce(**options: Any) -> nn.Module:
    return adapted(METHODS["ce-ssl"], compress_ratio=0.5, **options)


def test_ce_ssl_score_sees_the_gradient_through_a_zero_started_adapter() -> None:
    """(dL/dB) A of LoRA at B = 0 is G A^T A."""
    x, A, W = drawn(9, IN, seed=1), drawn(R, IN, seed=2), drawn(OUT, IN).requires_grad_(True)
    B = torch.zeros(OUT, R, requires_grad=True)
    (x @ (W + B @ A).mT).sin().sum().backward()
    seen = B.grad @ A
    close(seen, W.grad @ A.mT @ A)
    assert ce_ssl.score(W.grad, A) == pytest.approx(float(seen.square().mean()), rel=1e-5)
    taylor = float((W.detach() * seen).square().mean())
    assert ce_ssl.score(W.grad, A, W.detach()) == pytest.approx(taylor, rel=1e-5)


@pytest.mark.parametrize("score", ["taylor", "fisher"])
@pytest.mark.parametrize(("share", "kept"), [(0.0, 5), (0.5, 3), (0.6, 2), (1.0, 0)])
def test_ce_ssl_halves_the_ranks_of_the_low_scores(score: str, share: float, kept: int) -> None:
    sizes = {"a": 1.0, "b": 100.0, "c": 10.0, "d": 10.0, "e": 0.1}
    G, W = drawn(OUT, IN), drawn(OUT, IN, seed=1)
    moments = {layer: {"mean_grad": size * G, "weight": W} for layer, size in sizes.items()}
    options = METHODS["ce-ssl"].options({"compress_ratio": share, "score": score})
    ranks = ce_ssl.spread(moments, dict.fromkeys(sizes, (OUT, IN)), 4, options)
    order = ["b", "c", "d", "a", "e"]
    assert ranks == {layer: 4 if layer in order[:kept] else 2 for layer in sizes}


def test_ce_ssl_taylor_score_weighs_by_the_weight_of_the_model() -> None:
    """Layers of one gradient are told apart by their weights alone."""
    model = nn.ModuleDict({"large": nn.Linear(6, 5, bias=False), "small": nn.Linear(6, 5, bias=False)})
    model["large"].weight.data, model["small"].weight.data = torch.ones(5, 6), 0.1 * torch.ones(5, 6)
    stats = {key: {"mean_grad": drawn(5, 6)} for key in ("large", "small")}
    adapt(model, "ce-ssl", 4, stats=stats, compress_ratio=0.5)
    assert find_adapter(model).settings["ranks"] == {"large": 4, "small": 2}
    with pytest.raises(WeftError, match="taylor"):
        adapt(model, "ce-ssl", 4, name="other", stats=stats, score="sum")
    with pytest.raises(WeftError, match="1 excluded"):
        adapt(model, "ce-ssl", 4, name="other", stats=stats, p=1.0)


def test_ce_ssl_mean_over_coins_is_what_evaluation_computes() -> None:
    model = ce(p=0.3)
    terms = find_adapter(model).all_terms()
    for number, term in enumerate(terms):
        term.B.data = drawn(*term.B.shape, seed=number)
    rule, x, steps = started(model), {n: drawn(3, n) for n in (16, 32)}, 300
    means, coins = [torch.zeros(()) for _ in terms], []
    for number in range(1, steps + 1):
        means = [m + t.train()(x[t.in_features]).detach() / steps for m, t in zip(means, terms, strict=True)]
        coins.append([bool(term.draw.all()) for term in terms])
        rule.after_step(model, number)
    ratios = [float((m / t.eval()(x[t.in_features])).detach().mean()) for m, t in zip(means, terms, strict=True)]
    assert abs(sum(ratios) / len(ratios) - 1) < 3 * (0.3 / 0.7 / (steps * len(ratios))) ** 0.5
    assert any(len(set(of_step)) == 2 for of_step in coins), "the layers of a model have a coin each"
    term, x = terms[0], x[16]
    single = term.scale * x @ (term.B @ term.A).mT
    close(term.eval()(x), 0.7 * single)
    close(term.dense(), 0.7 * term.scale * term.B @ term.A)


def test_ce_ssl_layer_that_sits_out_rests() -> None:
    """No gradient, so that neither Adam's momentum nor decay moves it."""
    model = ce(p=0.5)
    optimizer = torch.optim.AdamW(trainable(model).parameters.values(), lr=1e-2, weight_decay=0.1)
    rule, terms = started(model, optimizer), find_adapter(model).all_terms()
    rested = 0
    for number in range(1, 5):
        before = [(term.A.detach().clone(), bool(term.draw.any())) for term in terms]
        torch.manual_seed(number)
        step(model.train(), rule, optimizer, number, model(**task()[0]).loss)
        for term, (A, plays) in zip(terms, before, strict=True):
            assert torch.equal(A, term.A) is not plays
            rested += not plays
    assert 4 < rested < 24


def test_ce_ssl_without_coins_is_lora(tmp_path: Path) -> None:
    model = ce(p=0.0, alpha=8.0)
    plain = adapt(tiny_llama(), "lora", 4, ranks=find_adapter(model).settings["ranks"], alpha=8.0)
    for layer, terms in find_adapter(model).terms.items():
        plain_term = find_adapter(plain).terms[layer]["default"]
        plain_term.A.data = terms["default"].A.detach().clone()
    for each in (model, plain):
        train(each, 3)
    close(logits(model), logits(plain))
    close(peft_logits(model, tmp_path), logits(plain))


def test_ce_ssl_is_the_base_while_B_is_zero() -> None:
    model = ce(p=0.5).train()
    assert torch.equal(logits(model), logits(tiny_llama()))


# ---- increlora


GROWING = {"warmup": 0, "interval": 1, "ramp": 0, "top_h": 2}


def growing(**options: Any) -> nn.Module:
    return adapted(METHODS["increlora"], **{**GROWING, **options})


def live(model: nn.Module) -> list[int]:
    """Live components by layer, as the terms themselves tell."""
    return [live_components(part, 1) for part in find_adapter(model).all_terms()]


def test_increlora_starts_at_the_base_up_to_its_reserve() -> None:
    _, term = one("increlora", alpha=16.0)
    assert term.s.tolist()[:4] == [0, pytest.approx(1e-5), pytest.approx(1e-5), 0] and term.rank == 4 * R
    norms = (term.U.norm(dim=0) * term.V.norm(dim=1)).max()
    assert 0 < float(term.dense().norm().detach()) <= 2 * 16 / R * 1e-5 * float(norms.detach()) < 1e-4


def test_increlora_score_is_that_of_the_dense_gradient() -> None:
    model, term = one("increlora", alpha=8.0)
    term.s.data = drawn(term.rank)
    rule = started(model.train())
    x, y = drawn(2, 5, IN, seed=1), drawn(2, 5, OUT, seed=2)
    delta = term.dense().detach().requires_grad_(True)
    (x @ (model.layer.terms["base"].dense() + delta).mT - y).square().mean().backward()
    expected = (delta.detach() * delta.grad).abs().sum() / (OUT * IN) ** 0.5
    (model(x) - y).square().mean().backward()
    (growth,) = rule.rules
    close(growth.hooks[0].take(growth.mean), expected)
    model.eval()(x).sum().backward()
    assert growth.hooks[0].total is None
    growth.mean, growth.doubt = torch.tensor([2.0]), torch.tensor([1.0])
    growth.hooks[0].add(torch.tensor(6.0))
    growth._measure()
    close(growth.mean, torch.tensor([0.85 * 2 + 0.15 * 6]))
    close(growth.doubt, torch.tensor([0.85 * 1 + 0.15 * (6 - 2.6)]))


def test_increlora_grows_the_highest_scores_to_the_total() -> None:
    """7 layers from 1 to 4 on average: 21 components, 3 layers by 2 at a time, in ceil(21 / 6) = 4 events."""
    model = growing(top_h=3)
    (growth,) = (rule := started(model, make_optimizer(model, 1e-3))).rules
    totals = []
    for number in range(1, 7):
        scores = torch.tensor([3.0, 9, 1, 9, 2, 9, 9]) + number
        growth._measure = lambda scores=scores: (growth.mean.copy_(scores), growth.doubt.fill_(1))
        before = live(model)
        rule.before_step(model, number)
        rule.after_step(model, number)
        grown = [i for i, (a, b) in enumerate(zip(before, live(model), strict=True)) if b > a]
        assert grown == ([1, 3, 5] if number < 5 and number < 4 else [1, 3] if number == 4 else []), number
        totals.append(sum(live(model)))
    assert totals == [13, 19, 25, 28, 28, 28]
    assert not any(hook.on for hook in growth.hooks)
    for term, count in zip(find_adapter(model).all_terms(), live(model), strict=True):
        assert not term.s[count:].any(), "what was in reserve is closed at the end"


def test_increlora_growth_changes_no_output() -> None:
    model = growing(interval=4, warmup=1)
    train(model, 3)
    (growth,) = (rule := started(model, make_optimizer(model, 1e-3))).rules
    before, counts = logits(model), live(model)
    rule.before_step(model, 4)
    rule.after_step(model, 4)
    assert sum(live(model)) == sum(counts) + 4 and growth.missing
    close(logits(model), before)


def test_increlora_moments_and_ages_follow_the_components() -> None:
    model = growing(interval=3)
    optimizer = make_optimizer(model, 1e-2)
    rule = started(model, optimizer)
    for number in range(1, 6):
        step(model.train(), rule, optimizer, number, model(**task()[number % 4]).loss)
        if number == 2:
            old = copy.deepcopy({i: optimizer.state[t.U] for i, t in enumerate(find_adapter(model).all_terms())})
        if number == 3:  # growth changes what is there, not the state of what stays
            assert sum(live(model)) == 11
            for i, term in enumerate(find_adapter(model).all_terms()):
                state, stays = optimizer.state[term.U], old[i]["index"].numel()
                assert state["index"].numel() == live(model)[i] + 2 and (state["age"][:stays] == 3).all()
                assert not state["exp_avg"][:, stays:].any() and not state["age"][stays:].any()
                assert optimizer.state[term.s]["index"].numel() == live(model)[i]
    for term, count in zip(find_adapter(model).all_terms(), live(model), strict=True):
        ages = optimizer.state[term.U]["age"].tolist()
        assert ages == ([5, 5, 5, 2, 2] if count == 3 else [5, 5, 5])


def test_increlora_trains_what_is_there_alone() -> None:
    """Also with a decay, and with an optimizer that knows nothing of components."""
    model = growing(warmup=90)
    terms = find_adapter(model).all_terms()
    before = [[p.detach().clone() for p in (t.U.mT, t.V, t.s)] for t in terms]
    for optimizer in (make_optimizer(model, 1e-2, 0.1), torch.optim.SGD(trainable(model).parameters.values(), 1e-2)):
        rule = started(model, optimizer)
        for number in range(1, 4):
            step(model.train(), rule, optimizer, number, model(**task()[number]).loss)
        for term, old in zip(terms, before, strict=True):
            pairs = zip((term.U.mT, term.V, term.s), old, strict=True)
            moved = [(p.detach() != q).reshape(term.rank, -1).any(1) for p, q in pairs]
            assert moved[0].tolist() == moved[1].tolist() == [True] * 3 + [False] * (term.rank - 3)
            assert moved[2].tolist() == [True] + [False] * (term.rank - 1)


def test_increlora_ramps_what_is_new() -> None:
    model, term = one("increlora", ramp=4, coefficient=0.0)
    term.s.data[:2] = 1.0
    (growth,) = (rule := started(model)).rules
    growth.born[0, 1], growth.lived[0, 1] = 10, 10
    growth.live = [2]
    for number, share in ((11, 0.25), (12, 0.5), (14, 1.0), (20, 1.0)):
        before = [p.detach().clone() for p in (term.U.mT, term.V, term.s)]
        for parameter in (term.U, term.V, term.s):
            parameter.grad = torch.ones_like(parameter)
        step_size = torch.optim.SGD([term.U, term.V, term.s], lr=0.1)
        rule.before_step(model, number)
        step_size.step()
        rule.after_step(model, number)
        for now, old in zip((term.U.mT, term.V, term.s), before, strict=True):
            change = (old - now).detach().reshape(term.rank, -1)[:, 0]
            torch.testing.assert_close(change[:2], torch.tensor([0.1, 0.1 * share]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("early", [False, True])
def test_increlora_resumes_amid_its_growth(early: bool) -> None:
    """Bit for bit, whether the optimizer's state is loaded before the rule starts (the Trainer does so) or after."""
    straight, halfway, resumed = (growing(interval=2, ramp=3) for _ in range(3))
    train(straight, 6)
    _, (optimizer_state, rule_state) = train(halfway, 3)
    resumed.load_state_dict(halfway.state_dict())
    optimizer, rule = make_optimizer(resumed, 5e-3), Rules(rules(resumed))
    rule.bind(optimizer)
    if early:
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    rule.start(resumed, steps=100)
    if not early:
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    rule.load_state_dict(copy.deepcopy(rule_state))
    for number in range(4, 7):
        torch.manual_seed(number)
        step(resumed.train(), rule, optimizer, number, resumed(**task()[number % 4]).loss)
    assert live(straight) == live(resumed) and sum(live(straight)) > 7
    ours, theirs = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_increlora_exports_its_live_components(tmp_path: Path) -> None:
    model = growing(alpha=8.0)
    train(model, 10)
    assert sum(live(model)) == 28 and len(set(live(model))) > 1
    close(peft_logits(model, tmp_path), logits(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == max(live(model))
    save_adapter(model, tmp_path / "own", format="weft")
    assert live(load_adapter(tiny_llama(), tmp_path / "own")) == live(model)


def test_increlora_refuses_to_start_above_the_rank() -> None:
    with pytest.raises(WeftError, match="start="):
        adapt(One(), "increlora", R, start=5)


# ---- lamda


def test_lamda_starts_on_the_principal_triplets_taken_out_of_the_base() -> None:
    model, term = one("lamda", alpha=8.0)
    x, W = drawn(5, IN, seed=1), drawn(OUT, IN)
    assert torch.equal(model(x), One(W)(x))
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    close(term.now.dense(), (U[:, :R] * s[:R]) @ V[:R])
    close(term.now.B.mT @ term.now.B, torch.eye(R))
    assert {n for n, p in term.named_parameters() if p.requires_grad} == {"now.R", "now.B"}
    assert trainable(model).count == R * OUT + R * R


@pytest.mark.parametrize("sharp", [torch.optim.SGD, torch.optim.AdamW])
def test_lamda_freezes_columns_on_schedule(sharp: Any) -> None:
    """Column j is constant from step ceil((j + 1) eta T / r) on, in spite of momentum and decay; A always is."""
    steps, eta = 20, 0.5
    model, term = one("lamda", steps=steps, eta=eta)
    B, A = term.now.B, term.now.A.detach().clone()
    options = {"momentum": 0.9} if sharp is torch.optim.SGD else {}
    optimizer = sharp(trainable(model).parameters.values(), lr=1e-2, weight_decay=0.1, **options)
    rule, history = started(model, optimizer), [B.detach().clone()]
    updates = 0
    for number in range(1, steps + 1):
        step(model, rule, optimizer, number, model(drawn(8, IN, seed=number)).square().mean())
        history.append(B.detach().clone())
        updates += int((history[-1] != history[-2]).any(0).sum())
    for column in range(R):
        fixed = math.ceil((column + 1) * eta * steps / R)
        for number in range(1, steps + 1):
            same = torch.equal(history[number][:, column], history[number - 1][:, column])
            assert same is (number > fixed), (column, number)
    assert updates / (steps * R) == pytest.approx(eta / 2, abs=0.1)
    assert torch.equal(term.now.A, A) and B not in optimizer.state and term.now.R in optimizer.state


def test_lamda_schedule_is_exact_where_rounding_is_not() -> None:
    rule, model = FreezeColumns(eta=0.3), one("lamda")[0]
    rule.start(model, find_adapter(model).terms, steps=100)
    assert [rule.frozen(i, 30) for i in (0, 1, 29, 30, 99)] == [0, 1, 29, 30, 30]
    with pytest.raises(WeftError, match="follows the length of the run, which is not known"):
        rule.start(model, find_adapter(model).terms)
    with pytest.raises(WeftError, match="from 0 to 1"):
        FreezeColumns(eta=2.0)


def test_lamda_without_a_trained_side_is_lora_xs() -> None:
    """eta = 0: the steps of R are those of LoRA-XS between the same sides."""
    model, term = one("lamda", steps=10, eta=0.0)
    xs, other = one("lora-xs")
    other.B.data, other.A.data = term.now.B.detach().clone(), term.now.A.detach().clone()
    other.R.data.zero_()
    for each in (model, xs):
        optimizer = torch.optim.SGD(trainable(each).parameters.values(), lr=1e-3)
        rule = started(each, optimizer)
        for number in range(1, 4):
            step(each, rule, optimizer, number, each(drawn(8, IN, seed=number)).square().sum())
    close(term.dense(), other.dense())


def test_lamda_keeps_2r_numbers_a_token() -> None:
    _, term = one("lamda")
    x = drawn(7, IN, seed=1).requires_grad_(True)
    kept, weights = [], {p.data_ptr() for p in term.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.append(0 if tensor.data_ptr() in weights else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        term(x)
    assert sum(kept) == 7 * 2 * R


def test_lamda_resumes_after_freezing() -> None:
    """A run that is interrupted when all of B is frozen ends on the same bytes."""
    straight, halfway, resumed = (adapted(METHODS["lamda"], steps=6, eta=0.5) for _ in range(3))
    train(straight, 6)
    _, state = train(halfway, 4)
    resumed.load_state_dict(halfway.state_dict())
    train(resumed, 2, start=4, state=copy.deepcopy(state))
    ours, theirs = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_lamda_is_a_lora_to_peft(tmp_path: Path) -> None:
    model = adapted(METHODS["lamda"], alpha=8.0)
    train(model, 3)
    close(peft_logits(model, tmp_path), logits(model))


# ---- lora-ggpo


def noisy(seed: int = 1, **options: Any) -> tuple[One, Any, Rules]:
    """A LoRA that has moved away from zero, under the noise of its rule."""
    model, term = one("lora-ggpo", alpha=8.0, **options)
    term.B.data = 0.1 * drawn(OUT, R, seed=seed)
    return model, term, started(model)


def test_ggpo_without_noise_is_lora() -> None:
    """In training with sigma = beta = 0, and always in evaluation, bit for bit."""
    silent, plain = adapted(METHODS["lora-ggpo"], sigma=0.0, beta=0.0), adapted(METHODS["lora"])
    for layer, terms in find_adapter(silent).terms.items():
        terms["default"].A.data = find_adapter(plain).terms[layer]["default"].A.detach().clone()
    assert train(silent, 3)[0] == train(plain, 3)[0]
    assert torch.equal(logits(silent), logits(plain))
    model, _, _ = noisy()
    x = drawn(5, IN, seed=2)
    assert torch.equal(model.eval()(x), model(x)) and not torch.equal(model.train()(x), model.eval()(x))


def test_ggpo_noise_has_the_law_of_a_perturbed_weight() -> None:
    """Mean 0, and variance z_i^2 ||x||^2 / out, as E x has."""
    model, _, rule = noisy(sigma=0.5)
    x = drawn(3, IN, seed=2)
    z = rule.rules[0].hooks[0].scale
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([model.train()(x) - model.eval()(x) for _ in range(2000)])
    deviation = z * x.norm(dim=1, keepdim=True) / OUT**0.5
    assert float((draws.mean(0) / deviation * 2000**0.5).abs().max()) < 4.5
    assert float((draws.var(0) / deviation.square() - 1).abs().mean()) < 0.05
    by_matrix = torch.stack([x @ (z.unsqueeze(1) * torch.randn(OUT, IN) / OUT**0.5).mT for _ in range(2000)])
    assert float((draws.var(0) / by_matrix.var(0) - 1).abs().mean()) < 0.06
    first, second, _ = (draws / deviation).unbind(1)
    assert abs(float((first * second).mean())) < 0.02, "tokens are drawn apart"


def test_ggpo_noise_scale_by_rows() -> None:
    """n from the exact row norms of s B A; q of the first-order change of s B A under a step along the gradients."""
    model, term, rule = noisy(sigma=0.3, beta=0.2)
    (guided,) = rule.rules
    W = model.layer.terms["base"].dense()
    n = (W.norm(dim=1).mean().square() + term.dense().norm(dim=1).square()).sqrt()
    close(guided.hooks[0].scale, 0.3 * n)
    fresh = one("lora-ggpo")[0]
    close(started(fresh).rules[0].hooks[0].scale, 0.03 * W.norm(dim=1).mean().expand(OUT))
    model.eval()(drawn(9, IN, seed=3)).square().mean().backward()
    rule.before_step(model, 1)
    h, B, A = 1e-6, term.B.detach().double(), term.A.detach().double()
    ahead, back = ((B + sign * h * term.B.grad) @ (A + sign * h * term.A.grad) for sign in (1, -1))
    q = (term.scale * (ahead - back) / (2 * h)).norm(dim=1)
    close(guided.slope[0], q, 1e-4)
    rule.after_step(model, 1)
    close(guided.hooks[0].scale, 0.3 * n + 0.2 * q.square(), 1e-4)


def test_ggpo_noise_is_a_constant_for_the_gradients() -> None:
    """With a fixed upstream gradient those of A, B and x are LoRA's."""
    model, term, _ = noisy(sigma=1.0)
    found = []
    for mode in (True, False):
        x = drawn(5, IN, seed=2).requires_grad_(True)
        model.zero_grad()
        (model.train(mode)(x) * drawn(5, OUT, seed=3)).sum().backward()
        found.append((term.A.grad, term.B.grad, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_ggpo_draws_no_matrix_of_noise() -> None:
    model, _, _ = noisy()
    x, sizes = drawn(2, IN, seed=2), []

    class Drawn(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes.extend([made.numel()] if "rand" in str(func) or "normal" in str(func) else [])
            return made

    with Drawn():
        model.train()(x)
    assert sizes == [2 * OUT]


def test_ggpo_redraws_the_same_noise_when_recomputing() -> None:
    """With checkpointing, in training mode and under its rule, the gradients are the same to the bit."""
    found = []
    for checkpointing in (False, True):
        model = adapted(METHODS["lora-ggpo"], sigma=1.0)
        train(model, 2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        model.train()(**task()[0]).loss.backward()
        found.append([p.grad for p in trainable(model).parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_ggpo_is_silent_where_its_adapter_is_put_aside() -> None:
    model = adapted(METHODS["lora-ggpo"], sigma=1.0)
    train(model, 1)
    adapt(model, "lora", 2, name="other")
    weft.set_adapter(model, "other")
    ids = task()[0]["input_ids"]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    weft.set_adapter(model, "default")
    train(model, 1)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert len(layer._forward_hooks) == 1, "training again puts no second noise on"
