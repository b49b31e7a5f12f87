"""The invariants of the adapters that work in a factorisation of the weight: svfit, loldu, kasa, effort, salt."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

import weft
from tests.methods.one_layer import One, close
from weft.errors import WeftError
from weft.methods import METHODS, Site, kasa, loldu, svfit
from weft.rules import Rules
from weft.rules.kept_subspace import KeptSubspace, orthogonality_loss, size_loss
from weft.rules.spectral_penalty import SpectralPenalty
from weft.seeds import generator
from weft.terms import Dense, LowRank, Shifted, Spectral
from weft.terms.adapters import find_adapter
from weft.testing_adapters import PROPERTIES, adapted, task, tiny_llama, train
from weft.verbs.adapt import adapt, rules, trainable

OUT, IN, R = 24, 20, 4
SHAPES = [(OUT, IN), (IN, OUT), (IN, IN)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(W: Tensor, rank: int = R) -> Site:
    return Site("layer", {"base": Dense.from_matrix(W)}, rank, rank, {}, generator(0))


def one(method: str, W: Tensor, rank: int = R, **options: Any) -> One:
    return adapt(One(W), method, rank, **options)  # type: ignore[return-value]


def loss_gradient(model: One, x: Tensor, target: Tensor) -> Tensor:
    """The dense gradient of <y, target>, after a backward pass through the model."""
    (model(x) * target).sum().backward()
    return target.mT @ x


# ---- svfit


@pytest.mark.parametrize("shape", SHAPES)
def test_svfit_gradient_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    W = drawn(*shape)
    model = one("svfit", W)
    x = drawn(7, shape[1], seed=1)
    assert torch.equal(model(x), One(W)(x))
    G = loss_gradient(model, x, drawn(7, shape[0], seed=2))
    U, _, V = torch.linalg.svd(W)
    close(model.layer.terms["default"].s.grad, torch.stack([U[:, i] @ G @ V[i] for i in range(R)]), 1e-4)
    assert trainable(model).count == R


def test_svfit_is_the_weight_with_other_singular_values() -> None:
    """Both forms of the card: the residual plus U diag(sigma) V, and W plus U diag(sigma - S) V."""
    W = drawn(OUT, IN)
    model = one("svfit", W)
    term = model.layer.terms["default"]
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    sigma = s[:R] * torch.tensor([2.0, 0.5, 1.0, -1.0])
    term.s.data = sigma - s[:R]
    merged = model.layer.dense()
    close(merged, W - (U[:, :R] * s[:R]) @ V[:R] + (U[:, :R] * sigma) @ V[:R])
    core = U.mT @ merged @ V.mT
    close(core, torch.diag(torch.cat([sigma, s[R:]])))


def test_svfit_first_adam_step_moves_each_value_by_the_rate() -> None:
    W, x = drawn(OUT, IN), drawn(7, IN, seed=1)
    s = torch.linalg.svdvals(W)[:R]
    for relative, expected in ((False, torch.full((R,), 0.01)), (True, 0.01 * s)):
        model = one("svfit", W, relative=relative)
        optimizer = torch.optim.Adam(weft.parameter_groups(model, 0.01))
        loss_gradient(model, x, drawn(7, OUT, seed=2))
        optimizer.step()
        U, _, V = torch.linalg.svd(W, full_matrices=False)
        close((U.mT @ (model.layer.dense() - W) @ V.mT).diagonal()[:R].abs(), expected, 1e-4)


def test_svfit_energy_chooses_the_rank_up_to_the_cap() -> None:
    Q, P = torch.linalg.qr(drawn(OUT, IN))[0], torch.linalg.qr(drawn(IN, IN, seed=1))[0]
    W = (Q * torch.tensor([3.0, 2.0, 1.0] + [0.1] * (IN - 3))) @ P  # 9 + 4 + 1 + 0.17
    for energy, rank in ((0.5, 1), (0.9, 2), (0.98, 3), (1.0, 6)):
        model = one("svfit", W, 6, energy=energy)
        assert model.layer.terms["default"].rank == trainable(model).count == rank
    with pytest.raises(WeftError, match="share"):
        one("svfit", W, energy=99.0)


def test_svfit_keeps_nothing_of_the_input_for_the_backward_pass() -> None:
    term = svfit.split(site(drawn(OUT, IN)), energy=None, relative=False).terms[""]
    kept: list[tuple[int, ...]] = []
    x = drawn(9, IN, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        term(x)
    assert (9, IN) not in kept and (9, R) in kept


def test_svfit_of_the_identity_stays_diagonal() -> None:
    model = one("svfit", torch.eye(IN), IN)
    model.layer.terms["default"].s.data = drawn(IN)
    W = model.layer.dense()
    assert (W - torch.diag(W.diagonal())).abs().max() < 1e-6


# ---- loldu


@pytest.mark.parametrize("shape", SHAPES)
def test_ldu_agrees_with_scipy(shape: tuple[int, int]) -> None:
    W = drawn(*shape).double()
    L, D, U = loldu.ldu(W)
    P, L_scipy, U_scipy = (torch.from_numpy(factor) for factor in scipy.linalg.lu(W.numpy()))
    close(L, P @ L_scipy, 1e-10)
    close(D, U_scipy.diagonal(), 1e-10)
    close(D.unsqueeze(1) * U, U_scipy, 1e-10)
    close((L * D) @ U, W, 1e-10)
    close(U.diagonal(), torch.ones(min(shape)))
    assert L.abs().max() <= 1 and not (P.mT @ L).triu(1).any()


def test_ldu_of_a_singular_matrix() -> None:
    W = drawn(OUT, 6) @ drawn(6, IN, seed=1)
    W[3], W[:, 5] = 0, 0
    tiny = torch.tensor([[1e-12, 1.0], [0.0, 1.0]])  # a pivot that would make U's row 1e12
    for matrix in (W, torch.zeros(OUT, IN), torch.ones(OUT, IN), tiny):
        L, D, U = loldu.ldu(matrix)
        assert torch.isfinite(L).all() and torch.isfinite(U).all() and U.abs().max() < 1e7
        close((L * D) @ U, matrix)


def test_loldu_moves_the_diagonal_alone_and_back() -> None:
    W, x = drawn(OUT, IN), drawn(7, IN, seed=1)
    model = one("loldu", W, alpha=2.0)
    L, D, U = loldu.ldu(W)
    term = model.layer.terms["default"]
    assert torch.equal(model(x), One(W)(x)) and trainable(model).count == R
    z = drawn(R, seed=2)
    term.s.data = z - D[:R]
    close(model.layer.dense(), W + 2.0 / R * (L[:, :R] * (z - D[:R])) @ U[:R])
    close(model(x), x @ model.layer.dense().mT)
    term.s.data *= 0
    assert torch.equal(model.layer.dense(), W)


def test_loldu_at_full_rank_is_the_whole_weight() -> None:
    W = drawn(IN, OUT)
    model = one("loldu", W, IN, alpha=float(IN))
    model.layer.terms["default"].s.data = -loldu.ldu(W)[1]
    assert model.layer.dense().abs().max() < 1e-5


@pytest.mark.parametrize("start", loldu.STARTS)
def test_loldu_starts(start: str) -> None:
    W = drawn(OUT, IN)
    D = loldu.ldu(W)[1][:R]
    model = one("loldu", W, start=start, alpha=None)
    z = model.layer.terms["default"].s.detach() + D
    expected = {"lu": D, "constant": D.mean().expand(R), "ones": torch.ones(R), "zeros": torch.zeros(R)}
    if start in expected:
        close(z + D, expected[start] + D)
    if start == "uniform":
        assert z.abs().max() <= D.mean().abs() / 2
    L, _, U = loldu.ldu(W)
    close(model.layer.dense(), W + (L[:, :R] * (z - D)) @ U[:R])
    with pytest.raises(WeftError, match="nearest are: ones"):
        one("loldu", W, start="one")


# ---- kasa


@pytest.mark.parametrize("shape", SHAPES)
def test_kasa_drops_the_smallest_components(shape: tuple[int, int]) -> None:
    W, x = drawn(*shape), drawn(7, shape[1], seed=1)
    s = torch.linalg.svdvals(W)
    model = one("kasa", W)
    W0 = model.layer.dense().detach()
    close(torch.linalg.matrix_norm(W - W0, 2), s[-R])
    close(torch.linalg.svdvals(W0)[:-R], s[:-R])
    assert int(torch.linalg.matrix_rank(W0, rtol=1e-5)) == min(shape) - R
    close(model(x), x @ W0.mT)
    assert torch.equal(weft.remove_adapter(model).layer.weight, W)


def test_kasa_without_its_diagonal_is_lora() -> None:
    W = drawn(OUT, IN)
    term = kasa.split(site(W), alpha=8.0, dropout=0.0, beta=0.0, gamma=0.0).terms[""]
    assert isinstance(term, Spectral) and not term.U.any() and term.s.std() > 0.1
    assert term.V.abs().max() <= 1 / math.sqrt(IN)
    term.U.data, term.s.data = drawn(OUT, R, seed=1), torch.ones(R)
    x = drawn(7, IN, seed=2)
    close(term(x), LowRank.from_factors(term.U, term.V, scale=2.0)(x))
    with pytest.raises(WeftError, match="from 1 to 19"):
        one("kasa", W, IN)


def test_kasa_components_are_not_dropped_twice() -> None:
    W = drawn(OUT, IN)
    model = one("kasa", W)
    with pytest.raises(WeftError, match="one at a time"):
        adapt(model, "kasa", R, name="second")
    weft.set_adapter(model, [])
    adapt(model, "kasa", R, name="second")
    adapt(model, "lora", R, name="third")
    s = torch.linalg.svdvals(W)
    close(torch.linalg.matrix_norm(W - model.layer.dense(), 2), s[-R])


def test_kasa_penalty_is_the_formula() -> None:
    model = adapted(METHODS["kasa"])
    penalties = []
    for beta, gamma in ((0.5, 0.0), (0.0, 0.25), (0.5, 0.25)):
        expected = 0.0
        for terms in find_adapter(model).terms.values():
            B, d, A = (p.detach().double() for p in (terms["default"].U, terms["default"].s, terms["default"].V))
            expected += beta * float((d * d).sum())
            for gram in (B.mT @ B, A @ A.mT):
                expected += gamma * math.sqrt(float((gram - torch.eye(len(gram))).square().sum()))
        rule = SpectralPenalty(size=beta, orthogonality=gamma)
        rule.start(model, find_adapter(model).terms)
        found = rule.penalty(model)
        assert found.item() == pytest.approx(expected, rel=1e-5)
        penalties.append(found.item())
    assert penalties[2] == pytest.approx(penalties[0] + penalties[1])
    V = torch.linalg.qr(drawn(IN, R))[0].mT
    term = Spectral.from_factors(torch.eye(OUT)[:, :R], torch.zeros(R), V)
    assert float(SpectralPenalty(size=1.0, orthogonality=1.0)._of(term)) < 1e-5
    assert [type(rule) for rule in rules(model)] == [SpectralPenalty]


def test_the_small_side_tells_the_distance_of_the_large_one() -> None:
    """||A^T A - I_in||^2 = ||A A^T - I_r||^2 + (in - r), why the r x r side is enough."""
    A = drawn(R, IN).double()
    large = (A.mT @ A - torch.eye(IN)).square().sum()
    close(large, (A @ A.mT - torch.eye(R)).square().sum() + IN - R, 1e-10)


def test_kasa_agrees_with_peft() -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    modules = ["q_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=R, lora_alpha=6, target_modules=modules, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), config)
    ours = adapt(tiny_llama(), "kasa", R, targets=modules, alpha=6.0, beta=0.3, gamma=0.2)
    for layer, terms in find_adapter(ours).terms.items():
        module = theirs.get_base_model().get_submodule(layer)
        close(ours.get_submodule(layer).dense(), module.get_base_layer().weight)
        B, d, A = drawn(*terms["default"].U.shape, seed=1), drawn(R, seed=2), drawn(*terms["default"].V.shape, seed=3)
        terms["default"].U.data, terms["default"].s.data, terms["default"].V.data = B.clone(), d.clone(), A.clone()
        module.lora_B["default"].weight.data, module.lora_A["default"].weight.data = B, A
        module.lora_diag["default"].data = d
    ids = task()[0]["input_ids"]
    close(ours(ids).logits, theirs.eval()(ids).logits)
    rule = Rules(rules(ours))
    rule.start(ours, steps=100)
    close(rule.penalty(ours), theirs._get_kasa_loss())


# ---- effort


@pytest.mark.parametrize("shape", SHAPES)
def test_effort_takes_the_minor_part_as_three_factors(shape: tuple[int, int]) -> None:
    W, x = drawn(*shape), drawn(7, shape[1], seed=1)
    model = one("effort", W)
    term = model.layer.terms["default"]
    assert isinstance(term, Shifted) and isinstance(term.now, Spectral)
    assert torch.equal(model(x), One(W)(x))
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    close(term.now.dense(), (U[:, -R:] * s[-R:]) @ V[-R:], 1e-4)
    close(term.now.s, s[-R:])
    assert trainable(model).count == (sum(shape) + 1) * R


def test_effort_of_every_component_trains_the_whole_weight() -> None:
    W = drawn(OUT, IN)
    model = one("effort", W, IN)
    model.layer.terms["default"].now.s.data *= 0
    assert model.layer.dense().abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_effort_losses_are_the_papers(shape: tuple[int, int]) -> None:
    """Against the big Gram matrices and the whole weights, at the start and away from it."""
    W = drawn(*shape)
    model = one("effort", W, orthogonality=1.0, norm=1.0)
    term = model.layer.terms["default"]
    rule = Rules(rules(model))
    rule.start(model, steps=100)
    assert float(rule.penalty(model)) < 1e-3
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    for parameter in term.now.parameters():
        parameter.data += 0.1 * drawn(*parameter.shape, seed=3)
    sides = torch.cat([U[:, :-R], term.now.U], 1), torch.cat([V[:-R], term.now.V]).mT
    gram = sum((side.mT @ side - torch.eye(side.shape[1])).norm() / 2 for side in sides)
    size = (model.layer.dense().square().sum() - W.square().sum()).abs()
    assert float(rule.penalty(model)) == pytest.approx(float(gram + size), rel=1e-3)


def test_effort_start_has_no_loss_and_no_gradient() -> None:
    W = drawn(IN, IN)
    model = one("effort", W, orthogonality=1.0)
    rule = Rules(rules(model))
    rule.start(model, steps=100)
    penalty = rule.penalty(model)
    penalty.backward()
    assert float(penalty) < 1e-4
    assert all(p.grad is None or p.grad.abs().max() < 0.05 for p in trainable(model).parameters.values())


def test_effort_cheap_losses() -> None:
    Q = torch.linalg.qr(drawn(IN, IN).double())[0]
    main, V = Q[:12], drawn(R, IN, seed=1).double()
    both = torch.cat([main, V])
    slow = (both @ both.mT - torch.eye(12 + R)).norm()
    assert float(orthogonality_loss(main, V)) == pytest.approx(float(slow), rel=1e-4)
    # with exact orthogonality the size is that of the values alone
    factors = (Q[:, 12:], torch.rand(8).double() + 1, Q[12:])
    moved = (Q[:, 12:], factors[1] * 1.5, Q[12:])
    rest = (Q[:, :12], torch.ones(12).double(), Q[:12])
    expected = float((moved[1].square().sum() - factors[1].square().sum()).abs())
    assert float(size_loss(rest, moved, factors)) == pytest.approx(expected)


def test_effort_losses_are_off_unless_asked_for() -> None:
    model = adapted(METHODS["effort"])
    (rule,) = rules(model)
    assert isinstance(rule, KeptSubspace)
    rule.start(model, steps=100)
    assert rule.penalty(model) is None and not rule._main


def test_effort_losses_hold_the_subspace_while_it_learns() -> None:
    distances = []
    for weight in (0.0, 1.0):
        model = adapted(METHODS["effort"], orthogonality=weight)
        losses, _ = train(model, 20, lr=1e-2)
        measure = KeptSubspace(orthogonality=1.0, norm=0.0)
        measure.start(model, find_adapter(model).terms)
        distances.append(float(measure.penalty(model)))
        assert losses[-1] < losses[0]
    assert distances[1] < 0.5 * distances[0]


# ---- salt


def trained_salt(W: Tensor, rank: int = R, **options: Any) -> One:
    """A salt adapter with every trainable number moved."""
    model = one("salt", W, rank, **options)
    for parameter in trainable(model).parameters.values():
        parameter.data += 0.3 * drawn(*parameter.shape, seed=parameter.numel())
    return model


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_salt_starts_on_the_weight_and_is_the_formula_after(shape: tuple[int, int], relu: bool) -> None:
    W, x, head, k = drawn(*shape), drawn(7, shape[1], seed=1), 5, min(shape)
    model = one("salt", W, head=head, relu=relu)
    term = model.layer.terms["default"]
    assert torch.equal(model(x), One(W)(x)) and torch.equal(model.layer.dense(), W)
    assert trainable(model).count == 2 * head + 2 * (k - head) * R
    assert 0.9 < float(term.X.abs().max()) / math.sqrt(6 / R) <= 1
    model = trained_salt(W, head=head, relu=relu)
    term = model.layer.terms["default"]
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    signs = (U * term.U).sum(0)
    close(signs.abs(), torch.ones(k), 1e-4)
    S = torch.zeros(k, k)
    S[:head, :head] = torch.diag(term.scale * s[:head] + term.shift)
    S[head:, head:] = torch.diag(s[head:]) + term.X @ term.Y
    S = S.relu() if relu else S
    close(model.layer.dense(), (U * signs) @ S @ (V * signs.unsqueeze(1)), 1e-4)
    close(model(x), x @ model.layer.dense().mT)


def test_salt_without_a_tail_scales_and_shifts_without_a_head_it_is_lora() -> None:
    W = drawn(OUT, IN)
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    core = U.mT @ trained_salt(W, 1, head=1.0).layer.dense() @ V.mT
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-4
    model = trained_salt(W, head=0)
    term = model.layer.terms["default"]
    close(model.layer.dense(), W + term.U @ term.X @ term.Y @ term.V)
    assert int(torch.linalg.matrix_rank(model.layer.dense() - W, rtol=1e-5)) == R


def test_salt_changes_the_rank_of_head_and_block() -> None:
    W = drawn(OUT, IN)
    model = trained_salt(W, head=3)
    B, A = model.layer.terms["default"].exact_factors()
    assert A.shape[0] == 3 + R == int(torch.linalg.matrix_rank(model.layer.dense() - W, rtol=1e-5))
    close(W + B @ A, model.layer.dense())
    assert trained_salt(W, head=3, relu=True).layer.terms["default"].exact_factors() is None


def test_salt_relu_loses_the_negative_entries_of_the_block() -> None:
    model = one("salt", drawn(OUT, IN), head=3, relu=True)
    term = model.layer.terms["default"]
    term.X.data, term.Y.data = drawn(IN - 3, R, seed=1), drawn(R, IN - 3, seed=2)
    product = torch.diag(term.s[3:]) + term.X @ term.Y
    lost = term.block() + torch.diag(term.s[3:]) - product
    assert (product < 0).float().mean() > 0.3
    close(lost, torch.where(product < 0, -product, 0.0))
    term.block()[0, 1:].sum().backward()
    assert not term.X.grad[1:].any()
    term.shift.data[0] = -2 * term.s[0]  # below zero: the direction is gone, not turned round
    close(term.gain(), torch.tensor([-float(term.s[0]), 0.0, 0.0]))


def test_salt_refuses_a_head_that_is_none() -> None:
    for head in (1.5, -0.1, IN + 1):
        with pytest.raises(WeftError, match="a share from|none below zero"):
            one("salt", drawn(OUT, IN), head=head)
    with pytest.raises(WeftError, match="from 1 to 2"):
        one("salt", drawn(OUT, IN), R, head=IN - 2)


def test_salt_with_its_relu_is_saved_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["salt"]
    monkeypatch.setitem(METHODS, "salt", replace(method, defaults={**method.defaults, "relu": True}))
    for prop in ("start", "count", "learns", "merges", "saves", "compiles", "removal"):
        PROPERTIES[prop](METHODS["salt"])
