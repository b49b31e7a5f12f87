"""The invariants of each adapter method's paper, against closed forms and slow loops."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from tests.methods.one_layer import One, close
from weft.errors import WeftError
from weft.methods import METHODS, Site, corda, eva, lora, lora_ga, lora_sb, lora_xs, olora, pissa, soma
from weft.methods.adapter import scale_of
from weft.rules.annealed_decay import AnnealedDecay
from weft.rules.orthonormal import Orthonormal, orthonormal_pull
from weft.seeds import generator
from weft.stats.calibrate import calibrate
from weft.terms import CoreLowRank, Dense, LowRank, Magnitude, Shifted, Spectral
from weft.terms.adapters import adapters_of, find_adapter
from weft.testing_adapters import RANK, adapted, task, tiny_llama
from weft.verbs.adapt import adapt, parameter_groups, trainable

OUT, IN, R = 24, 20, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(W: Tensor, rank: int = R, **moments: Tensor) -> Site:
    return Site("layer", {"base": Dense.from_matrix(W)}, rank, rank, moments, generator(0))


def moment(x: Tensor) -> dict[str, Tensor]:
    return {"input_moment": (x.double().mT @ x.double()) / len(x), "input_mean": x.double().mean(0)}


# ---- lora, rslora, lora+


def test_lora_only_B_moves_at_first() -> None:
    model = adapted(METHODS["lora"])
    model(**task()[0]).loss.backward()
    for term in find_adapter(model).all_terms():
        assert isinstance(term, LowRank)
        assert not term.A.grad.any() and term.B.grad.any()


def test_lora_start_is_kaiming_uniform() -> None:
    _, A = lora.initialise(site(drawn(300, 400), 50), 1.0)
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound and A.abs().max() > 0.99 * bound
    close(A.std(), torch.tensor(bound / math.sqrt(3)), 0.02)
    assert abs(float(A.mean())) < 1e-3


def test_rslora_is_lora_with_a_larger_alpha() -> None:
    assert scale_of(16, alpha=8.0, rslora=True) == scale_of(16, alpha=8.0 * 4)
    assert scale_of(16) == 1.0


@pytest.mark.parametrize(("rslora", "least", "most"), [(False, 0.0, 0.3), (True, 1.0, 2.5)])
def test_rank_stability(rslora: bool, least: float, most: float) -> None:
    """After ten Adam steps the adapter's output shrinks with the rank under alpha / r, not under alpha / sqrt(r)."""
    x, y = drawn(64, 256), drawn(64, 256, seed=1)
    sizes = []
    for rank in (4, 256):
        model = adapt(One(torch.zeros(256, 256)), "lora", rank, alpha=16.0, rslora=rslora)
        optimizer = torch.optim.Adam(weft.parameter_groups(model, 1e-3))
        for _ in range(10):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        sizes.append(float(model(x).detach().std()))
    assert least <= sizes[1] / sizes[0] <= most


def test_adapters_add_up() -> None:
    W, x = drawn(OUT, IN), drawn(5, IN, seed=1)
    model = One(W)
    parts = []
    for name in ("one", "two"):
        adapt(model, "lora", R, name=name, seed=len(name), alpha=3.0)
        term = find_adapter(model, name).terms["layer"][name]
        assert isinstance(term, LowRank)
        term.B.data = drawn(OUT, R, seed=len(parts) + 2)
        parts.append(term.dense().detach())
    close(model(x).detach(), x @ (W + sum(parts)).mT)
    weft.set_adapter(model, "two")
    close(model(x).detach(), x @ (W + parts[1]).mT)


def test_lora_plus_moves_B_faster() -> None:
    model = adapt(One(drawn(OUT, IN)), "lora", R, ratio=16.0)
    groups = parameter_groups(model, 1e-3)
    assert sorted(group["lr"] for group in groups) == [1e-3, 1.6e-2]
    optimizer = torch.optim.Adam(groups)
    model(drawn(5, IN)).square().mean().backward()
    optimizer.step()
    term = find_adapter(model).terms["layer"]["default"]
    close(term.B.detach().abs(), torch.full((OUT, R), 1.6e-2), 1e-3)


def test_lora_plus_of_ratio_one_is_lora() -> None:
    ends = []
    for options in ({}, {"ratio": 1.0}):
        model = adapt(One(drawn(OUT, IN)), "lora", R, **options)
        assert len(parameter_groups(model, 1e-3)) == 1
        ends.append(find_adapter(model).rates)
    assert ends == [{}, {}]


def test_dropout_acts_on_the_adapter_in_training_alone() -> None:
    x = drawn(64, IN)
    model = adapt(One(drawn(OUT, IN)), "lora", R, dropout=0.5)
    term = find_adapter(model).terms["layer"]["default"]
    term.B.data = drawn(OUT, R)
    model.eval()
    close(model(x).detach(), x @ (model.layer.dense().detach()).mT)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(x), model.eval()(x))


# ---- dora


def dora() -> tuple[Magnitude, Tensor]:
    W = drawn(OUT, IN)
    model = adapt(One(W), "dora", R, alpha=2.0)
    term = model.layer.terms["default"]
    assert isinstance(term, Magnitude)
    term.update.B.data = 0.3 * drawn(OUT, R, seed=1)
    term.magnitude.data *= 1.3
    return term, W


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "soma", "lora-ga"])
def test_dropout_leaves_the_start_of_a_shifted_adapter_alone(name: str, tmp_path: Any) -> None:
    model = tiny_llama().train()
    before = model(**task()[0]).logits
    weft.adapt(model, name, rank=2, dropout=0.5, **({"batches": task()} if METHODS[name].needs else {}))
    model.train()
    torch.testing.assert_close(model(**task()[0]).logits, before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in trainable(model).parameters.values():
            parameter.add_(0.1)
    weft.save_adapter(model, tmp_path / "adapter")
    again = weft.load_adapter(tiny_llama(), tmp_path / "adapter")
    for one in (model, again):
        one.train()
        assert not torch.equal(one(**task()[0]).logits, one(**task()[0]).logits), "nothing is dropped"
    torch.testing.assert_close(again.eval()(**task()[0]).logits, model.eval()(**task()[0]).logits, atol=1e-4, rtol=1e-4)


def test_dora_rows_have_the_trained_lengths() -> None:
    term, W = dora()
    close(term.dense().detach().norm(dim=1), term.magnitude.detach(), 1e-6)
    V = W + term.update.dense().detach()
    close(term.row_norms(), V.norm(dim=1), 1e-6)
    x = drawn(7, IN)
    close(term(x).detach(), x @ term.dense().detach().mT)


def test_dora_holds_the_norm_constant_in_the_gradient() -> None:
    term, W = dora()
    x, target = drawn(7, IN), drawn(7, OUT, seed=2)
    (term(x) * target).sum().backward()
    grads = []
    for detached in (True, False):
        B = term.update.B.detach().clone().requires_grad_(True)
        V = W + term.update.scale * B @ term.update.A.detach()
        n = V.norm(dim=1, keepdim=True)
        (x @ (term.magnitude.detach().unsqueeze(1) * V / (n.detach() if detached else n)).mT * target).sum().backward()
        grads.append(B.grad)
    close(term.update.B.grad, grads[0])
    assert (term.update.B.grad - grads[1]).norm() > 0.05 * grads[1].norm()


def test_dora_needs_no_second_dora() -> None:
    model = adapt(One(drawn(OUT, IN)), "dora", R, name="one")
    with pytest.raises(WeftError, match="one at a time"):
        adapt(model, "dora", R, name="two")
    weft.set_adapter(model, [])
    adapt(model, "dora", R, name="two")
    weft.set_adapter(model, "one")
    assert list(model.layer.terms) == ["one"]


# ---- pissa, olora, soma


def test_pissa_takes_the_principal_part() -> None:
    W = drawn(OUT, IN)
    s = torch.linalg.svdvals(W)
    for scale in (1.0, 2.5):
        B, A = pissa.initialise(site(W), scale)
        residual = W - scale * B @ A
        close(torch.linalg.matrix_norm(residual, 2), s[R])
        close(residual.norm(), s[R:].norm())
        close(B.mT @ B, torch.diag(s[:R] / scale))
        close(A @ A.mT, torch.diag(s[:R] / scale))


def test_soma_takes_the_minor_part() -> None:
    W = drawn(OUT, IN)
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    B, A = soma.initialise(site(W), 2.0)
    close(torch.linalg.matrix_norm(2.0 * B @ A, 2), s[-R].double(), 1e-4)
    close(W - 2.0 * B @ A, (U[:, :-R] * s[:-R]) @ V[:-R])
    assert (pissa.initialise(site(W), 1.0)[1].double() @ A.mT).abs().max() < 1e-4


def test_soma_leaves_the_first_blocks_alone_and_trains_biases() -> None:
    shapes = {f"model.layers.{i}.q_proj": (8, 8) for i in range(24)}
    ranks = soma.spread({}, shapes, 16, METHODS["soma"].options({}))
    assert [rank > 0 for rank in ranks.values()] == [i >= 8 for i in range(24)]
    model = One(drawn(OUT, IN), bias=True)
    before = model.layer.bias.detach().clone()
    adapt(model, "soma", R)
    assert set(trainable(model).parameters) == {"layer.bias", "layer.terms.default.now.A", "layer.terms.default.now.B"}
    model.layer.bias.data += 1
    with weft.disable(model):
        assert torch.equal(model.layer.bias, before)
    assert torch.equal(model.layer.bias, before + 1)
    assert torch.equal(weft.remove_adapter(model).layer.bias, before)


def test_weight_decay_of_a_shift_moves_to_the_residual() -> None:
    W = drawn(OUT, IN)
    model = adapt(One(W), "soma", R)
    term = model.layer.terms["default"]
    start = term.start.dense().detach()
    term.now.A.data *= 0
    close(model.layer.dense().detach(), W - start)


def test_annealed_decay_follows_both_schedules() -> None:
    model = adapt(One(drawn(OUT, IN)), "soma", R)
    terms = find_adapter(model).terms
    rule = AnnealedDecay(0.05)
    rule.bind(torch.optim.SGD(trainable(model).parameters.values(), lr=1e-2))
    rule.start(model, terms, steps=100)
    for step in (1, 40, 100):
        done = (step - 1) / 100
        decay = 1e-5 + (0.05 - 1e-5) * 0.5 * (1 + math.cos(math.pi * done))
        assert rule.shrink(step) == pytest.approx(1e-2 * (1 - done) ** 0.9 * decay)
    before = terms["layer"]["default"].now.A.detach().clone()
    rule.after_step(model, 1)
    close(terms["layer"]["default"].now.A.detach(), before * (1 - 5e-4))
    assert AnnealedDecay(0.0).shrink(1) == 0


def test_olora_takes_the_leading_columns_of_qr() -> None:
    W = drawn(OUT, IN)
    B, A = olora.initialise(site(W), 1.0)
    close(B.mT @ B, torch.eye(R))
    assert not A.tril(-1)[:, :R].abs().max() > 1e-6
    close((W - B @ A)[:, :R], torch.zeros(OUT, R), 1e24)  # the first r columns are all in the factors
    close(B @ A[:, :R], W[:, :R])


@pytest.mark.parametrize("name", ["pissa", "olora", "soma"])
def test_full_rank_leaves_nothing(name: str) -> None:
    W = drawn(OUT, IN)
    B, A = {"pissa": pissa, "olora": olora, "soma": soma}[name].initialise(site(W, IN), 1.0)
    close(B @ A, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shifted_base_is_exact_in_any_dtype(dtype: torch.dtype) -> None:
    W, x = drawn(OUT, IN).to(dtype), drawn(5, IN, seed=1).to(dtype)
    plain, model = One(W), adapt(One(W), "pissa", R)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.layer.terms["base"].matrix, W)


# ---- corda


def test_corda_is_the_svd_of_the_oriented_weight() -> None:
    W, x = drawn(OUT, IN), drawn(200, IN, seed=1) @ drawn(IN, IN, seed=2)
    C = moment(x)["input_moment"]
    C = C + 0.01 * C.diagonal().mean() * torch.eye(IN)
    s = torch.linalg.svdvals(W.double() @ C)
    for mode, kept in (("ipm", s[:R]), ("kpm", s[-R:])):
        B, A = corda.initialise(site(W, **moment(x)), 2.0, mode=mode)
        product = 2.0 * B @ A @ C
        close(torch.linalg.svdvals(product)[:R], kept)
        close((W.double() @ C - product).square().sum(), s.square().sum() - kept.square().sum())
        columns = B.mT @ B
        close(columns - torch.diag(columns.diagonal()) + 1, torch.ones(R, R))


def test_corda_of_white_inputs_is_pissa() -> None:
    W = drawn(OUT, IN)
    B, A = corda.initialise(site(W, input_moment=3 * torch.eye(IN)), 1.0)
    P, Q = pissa.initialise(site(W), 1.0)
    close(B @ A, P @ Q)


def test_corda_ignores_the_moments_size_and_full_rank_leaves_nothing() -> None:
    W, x = drawn(OUT, IN), drawn(200, IN, seed=1)
    whole = [corda.initialise(site(W, input_moment=c * moment(x)["input_moment"]), 1.0) for c in (1.0, 1e-6)]
    close(whole[0][0] @ whole[0][1], whole[1][0] @ whole[1][1])
    B, A = corda.initialise(site(W, IN, **moment(x)), 1.0)
    close(B @ A, W)


# ---- eva


def test_eva_spans_the_principal_components() -> None:
    x = drawn(300, IN, seed=1) @ drawn(IN, IN, seed=2) + 5
    B, A = eva.initialise(site(drawn(OUT, IN), **moment(x)), 1.0, centred=True, whiten=False, rho=2.0)
    assert not B.any()
    close(A @ A.mT, torch.eye(R))
    _, s, V = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    assert (A @ V[:R].mT).diagonal().abs().min() > 0.999
    ratios = eva._ratios(moment(x), True, IN)
    close(ratios, s.square() / s.square().sum())
    other = eva.initialise(site(drawn(OUT, IN), **moment(100 * x)), 1.0, centred=True, whiten=False, rho=2.0)[1]
    close((A @ other.mT).abs().diagonal(), torch.ones(R))


def test_eva_spreads_the_budget_by_explained_variance() -> None:
    flat, steep = drawn(300, IN, seed=1), drawn(300, IN, seed=2) * torch.logspace(0, -3, IN)
    moments = {"flat": moment(flat), "steep": moment(steep)}
    shapes = dict.fromkeys(moments, (OUT, IN))
    options = METHODS["eva"].options({})
    ranks = eva.spread(moments, shapes, 3, options)
    assert sum(ranks.values()) == 6 and max(ranks.values()) <= 6
    claims = sorted(((float(r), n) for n in moments for r in eva._ratios(moments[n], True, 6)), reverse=True)[:6]
    assert ranks == {name: sum(n == name for _, n in claims) for name in moments}
    assert eva.spread(moments, shapes, 3, {**options, "rho": 1.0}) == {"flat": 3, "steep": 3}


def test_eva_keeps_one_scale_and_nested_directions() -> None:
    model = adapt(tiny_llama(), "eva", 3, batches=task(), alpha=8.0)
    (adapter,) = adapters_of(model).values()
    ranks = adapter.settings["ranks"]
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 3 * 7
    terms = {layer: terms["default"] for layer, terms in adapter.terms.items()}
    assert {term.scale for term in terms.values()} == {8.0 / 3}
    q, v = (terms[f"model.layers.0.self_attn.{n}_proj"] for n in "qv")
    least = min(q.rank, v.rank)
    close((q.A[:least] * v.A[:least]).sum(1).abs().detach(), torch.ones(least))


# ---- lora-ga, lora-sb


def ga(direction: str = "ArB2r", **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    W, G = drawn(OUT, IN), drawn(OUT, IN, seed=1)
    defaults = {"size": "stable", "gamma": 16.0, "clip": False, **options}
    B, A = lora_ga.initialise(site(W, mean_grad=G), 1.5, direction=direction, **defaults)
    return B, A, G


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_first_step_is_the_best_of_rank_2r(direction: str) -> None:
    B, A, G = ga(direction)
    c = OUT**0.25 / 4
    close(A @ A.mT, c**2 * torch.eye(R))
    close(B.mT @ B, c**2 * torch.eye(R))
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    close(B @ B.mT @ G + G @ A.mT @ A, c**2 * (U[:, : 2 * R] * s[: 2 * R]) @ V[: 2 * R])


def test_lora_ga_first_step_of_a_model_follows_the_gradient() -> None:
    """One step of SGD on A and B moves W along the best rank-2r part of the full gradient."""
    batches = list(task()[:2])
    full = tiny_llama()
    for batch in batches:
        (full(**batch).loss / len(batches)).backward()
    model = adapt(tiny_llama(), "lora-ga", 2, batches=batches)
    before = {layer: model.get_submodule(layer).dense().detach() for layer in find_adapter(model).terms}
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    torch.optim.SGD(trainable(model).parameters.values(), lr=1e-4).step()
    for layer, W in before.items():
        step = model.get_submodule(layer).dense().detach() - W
        U, s, V = torch.linalg.svd(full.get_submodule(layer).weight.grad, full_matrices=False)
        best = (U[:, :4] * s[:4]) @ V[:4]
        cosine = -(step * best).sum() / (step.norm() * best.norm())
        assert cosine > 0.99, (layer, float(cosine))


def test_lora_ga_sizes_and_clip() -> None:
    B, A, _ = ga(size="unit")
    close(A.norm(dim=1), torch.ones(R))
    B, A, _ = ga(size="gd")
    close(B.norm(dim=0), torch.full((R,), 1 / 1.5))
    B, A, _ = ga(size="weight")
    s = torch.linalg.svdvals(drawn(OUT, IN))
    close(A.norm(dim=1), (s[:R] / 1.5).sqrt().mean().expand(R))
    B, A, _ = ga(gamma=1e-3, clip=True)
    close((1.5 * B @ A).abs().max(), drawn(OUT, IN).abs().max())
    with pytest.raises(WeftError, match="nearest"):
        ga("ArBrr")


def test_lora_sb_starts_on_the_first_adam_step() -> None:
    W, G = drawn(OUT, IN), drawn(OUT, IN, seed=1)
    term = lora_sb.split(site(W, mean_grad=G), lr=1e-3, warmup=10, threshold=0.0).terms[""]
    assert isinstance(term, CoreLowRank)
    U, s, V = torch.linalg.svd(-1e-4 * G.sign(), full_matrices=False)
    close(term.dense().detach(), (U[:, :R] * s[:R]) @ V[:R])
    close(term.B.mT @ term.B, torch.eye(R))
    close(term.A @ term.A.mT, torch.eye(R))
    assert [n for n, p in term.named_parameters() if p.requires_grad] == ["R"]
    scaled = lora_sb.split(site(W, mean_grad=1e-8 * G), lr=1e-3, warmup=10, threshold=0.0).terms[""]
    close(scaled.dense().detach(), term.dense().detach())


def test_lora_sb_step_is_the_projection_of_the_full_step() -> None:
    term = lora_sb.split(
        site(drawn(OUT, IN), mean_grad=drawn(OUT, IN, seed=1)), lr=1e-3, warmup=10, threshold=0.0
    ).terms[""]
    x, target = drawn(9, IN, seed=2), drawn(9, OUT, seed=3)
    (term(x) * target).sum().backward()
    full = target.mT @ x
    step = (term.B @ term.R.grad @ term.A).detach()
    basis = torch.kron(term.B, term.A.mT.contiguous()).detach()  # vec(B X A) for all X, row-major
    projected = basis @ torch.linalg.lstsq(basis, full.flatten().unsqueeze(1)).solution
    close(step.flatten(), projected.squeeze(1), 1e-4)


def test_lora_sb_ignores_gradients_that_are_noise() -> None:
    G = drawn(OUT, IN, seed=1)
    G[:, 0] = 1e-12
    term = lora_sb.split(site(drawn(OUT, IN), IN, mean_grad=G), lr=1e-3, warmup=10, threshold=1e-6).terms[""]
    assert term.dense()[:, 0].abs().max() < 1e-9


def test_lora_xs_sits_between_the_weights_own_sides() -> None:
    W = drawn(OUT, IN)
    term = lora_xs.split(site(W), deviation=1e-5).terms[""]
    close((term.B @ term.A).detach(), pissa.initialise(site(W), 1.0)[0] @ pissa.initialise(site(W), 1.0)[1])
    assert 0 < term.R.abs().max() < 1e-4


# ---- sorsa


def test_sorsa_starts_orthonormal_on_pissas_product() -> None:
    W = drawn(OUT, IN)
    model = adapt(One(W), "sorsa", R)
    term = model.layer.terms["default"]
    assert isinstance(term, Shifted) and isinstance(term.now, Spectral)
    B, A = pissa.initialise(site(W), 1.0)
    close(term.now.dense().detach(), B @ A)
    close(term.now.U.mT @ term.now.U, torch.eye(R))
    assert trainable(model).count == R * (OUT + IN + 1)


def test_sorsa_pull_is_the_gradient_of_the_norm() -> None:
    V = drawn(R, IN).double().requires_grad_(True)
    (V @ V.mT - torch.eye(R)).norm().backward()
    close(orthonormal_pull(V.detach()), V.grad, 1e-10)
    Q = torch.linalg.qr(drawn(IN, R).double())[0].mT
    assert torch.isfinite(orthonormal_pull(Q)).all()
    assert not orthonormal_pull(torch.eye(R)).any()


def test_sorsa_pull_brings_factors_back() -> None:
    model = adapt(One(drawn(OUT, IN)), "sorsa", R)
    term = model.layer.terms["default"]
    term.now.U.data += 0.3 * drawn(OUT, R)
    rule, errors = Orthonormal(gamma=0.01, lr=0.5), []
    rule.start(model, find_adapter(model).terms)
    for step in range(20):
        for parameter in term.now.parameters():
            parameter.grad = torch.zeros_like(parameter)
        rule.before_step(model, step)
        assert not term.now.s.grad.any()
        torch.optim.SGD(term.now.parameters(), lr=1.0).step()
        errors.append(float((term.now.U.mT @ term.now.U - torch.eye(R)).detach().norm()))
    assert all(later < earlier for earlier, later in pairwise(errors))


# ---- for all of them


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.kind == "adapt"])
def test_a_seed_gives_the_same_bytes_whatever_else_is_adapted(name: str) -> None:
    method = METHODS[name]
    if method.share is not None or method.spread is not None:
        pytest.skip("what it draws for a layer depends on the other layers by definition")
    stats = calibrate(tiny_llama(), task(), method.needs) if method.needs else None
    both = [adapt(tiny_llama(), name, RANK, targets=t, stats=stats, seed=5) for t in ("all-linear", "q_proj")]
    layer = "model.layers.0.self_attn.q_proj"
    first, second = (find_adapter(model).terms[layer]["default"].state_dict() for model in both)
    assert all(torch.equal(first[key], second[key]) for key in second)
