"""Training a given model in structure against plain line-by-line references in fp64, and what the papers' rules owe."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.methods.one_layer import One, close
from tests.methods.test_structures import IN, OUT, STEPS, PlainAdam, batches, drawn, run, start
from weft.errors import WeftError
from weft.optim.whole import adamw
from weft.rules.feature_distillation import FeatureDistillation, Perturbation
from weft.rules.gradient_flow import GradientFlow, patterns
from weft.rules.truncate import Truncate, truncated
from weft.terms import Dense, Fading, LowRank, Masked
from weft.terms.fading import largest_of
from weft.verbs.fresh import Structure, finish, restructure


def spectrum(W: Tensor) -> Tensor:
    return torch.linalg.svdvals(W.detach().double())


# --- trp --------------------------------------------------------------------------------------------------------------


def test_trp_follows_its_lines():
    model, every = start("trp", None), 2
    W, adam, losses = drawn(), PlainAdam(), []
    for step, (x, y) in enumerate(batches(), 1):
        residual = x @ W.T - y
        losses.append(float(residual.square().mean()))
        W = W - adam.step(2.0 / residual.numel() * residual.T @ x)
        if step % every == 0 and step != STEPS:
            U, s, V = torch.linalg.svd(W, full_matrices=False)
            k = next(k for k in range(1, len(s) + 1) if s[:k].square().sum() >= 0.9 * s.square().sum())
            W = sum((s[j] - 0.02 * s[:k].mean()) * torch.outer(U[:, j], V[j]) for j in range(k))
    structure = Structure.of("trp", None, {"energy": 0.9, "nuclear": 0.02})
    assert run(model, structure) == pytest.approx(losses, rel=1e-8)
    close(model.layer.terms["dense"].matrix, W, 1e-7)


def test_a_truncation_keeps_the_least_rank_and_lowers_every_kept_value_alike():
    W = drawn() + 3 * torch.outer(drawn()[:, 0], drawn()[0])
    s, share = spectrum(W), 0.9
    k = int(torch.linalg.matrix_rank(truncated(W, share)))
    assert s[:k].square().sum() >= share * s.square().sum() > s[: k - 1].square().sum()
    assert float((truncated(W, share) - W).square().sum()) <= (1 - share) * float(W.square().sum())
    pulled = spectrum(truncated(W, share, 0.05))
    close(pulled[:k], s[:k] - 0.05 * s[:k].mean(), 1e-9)
    assert float(pulled[k:].max()) < 1e-9
    close(truncated(7.0 * W, share, 0.05), 7.0 * truncated(W, share, 0.05), 1e-9)
    close(truncated(W, 1.0), W, 1e-9)


def test_trp_without_truncation_is_plain_training_and_keeps_its_parameter():
    model, plain = start("trp", None), One(drawn().float()).double()
    matrix = model.layer.terms["dense"].matrix
    assert run(model) == run(plain)
    assert model.layer.terms["dense"].matrix is matrix and torch.equal(matrix, plain.layer.weight)


def test_trp_ends_as_factors_where_they_are_smaller():
    W = drawn()[:, :5] @ drawn()[:5] + 1e-3 * drawn()
    model = restructure(One(W.float()), "trp")
    finish(model, Structure.of("trp", None, {"energy": 0.99}))
    assert isinstance(model.layer.terms["low_rank"], LowRank) and model.layer.terms["low_rank"].rank <= 5
    flat = restructure(One(drawn().float()), "trp")
    matrix = flat.layer.terms["dense"].matrix
    finish(flat, Structure.of("trp", None, {"energy": 0.9999}))
    assert isinstance(flat.layer, nn.Linear) and flat.layer.weight.data_ptr() == matrix.data_ptr()


def test_the_period_of_truncations_follows_the_run():
    model = start("trp", None)
    for steps, every in ((100, 10), (100_000, 200), (20, 2)):
        rule = Truncate(0.99, 0.0)
        rule.start(model, steps=steps)
        assert rule.every == every
    with pytest.raises(WeftError, match=r"truncations \(every\) is 100 steps and the run has 100"):
        Truncate(0.99, 0.0, every=100).start(model, steps=100)


# --- spdf -------------------------------------------------------------------------------------------------------------


def test_spdf_follows_dense_training_whose_masked_gradients_and_weights_are_zero():
    model = start("spdf", None, sparsity=0.75)
    term = model.layer.terms["masked"]
    mask = term.mask()
    assert int(mask.sum()) == term.nonzeros == int(0.25 * OUT * IN)
    W, adam, losses = drawn() * mask, PlainAdam(), []
    for x, y in batches():
        residual = x @ W.T - y
        losses.append(float(residual.square().mean()))
        W = W - adam.step(2.0 / residual.numel() * (residual.T @ x) * mask)
    assert run(model) == pytest.approx(losses, rel=1e-9)
    close(term.dense(), W, 1e-8)
    assert not W[~mask].any() and torch.equal(term.mask(), mask)


def test_spdf_s_masks_are_each_layer_s_own_and_a_rescaled_start_keeps_the_variance():
    model = nn.ModuleList([nn.Linear(300, 200, bias=False), nn.Linear(300, 200, bias=False)])
    restructure(model, "spdf", rescale=True)
    one, other = (model.get_submodule(name).terms["masked"] for name in ("0", "1"))
    shared = float((one.mask() & other.mask()).float().mean())
    assert shared == pytest.approx(1 / 16, abs=0.01)  # as two independent draws have
    assert float(one.dense().square().sum(1).mean().detach()) == pytest.approx(1 / 3, rel=0.05)  # U(-1/sqrt(in), ..)


def test_spdf_by_magnitude_keeps_the_largest():
    term = start("spdf", None, sparsity=0.9, mask="magnitude").layer.terms["masked"]
    assert float(term.values.abs().min().detach()) > float(drawn()[~term.mask()].abs().max())


def test_weight_decay_takes_kept_entries_for_a_matrix():
    model = nn.ModuleList([nn.Linear(16, 16)])
    restructure(model, "spdf", sparsity=0.5)
    decayed, rest = adamw(model, weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert [p.numel() for p in decayed["params"]] == [128] and [p.numel() for p in rest["params"]] == [16]


# --- pela -------------------------------------------------------------------------------------------------------------


def test_pela_starts_as_the_truncated_svd_with_its_size_shared_evenly():
    model = start("pela", None, ratio=2.0)
    term, rank = model.layer.terms["low_rank"], int(OUT * IN / (2 * (OUT + IN)))
    s = spectrum(drawn())
    assert term.rank == rank and rank * (OUT + IN) <= OUT * IN / 2
    close(term.B.T @ term.B, s[:rank].diag(), 1e-5)
    close(term.A @ term.A.T, s[:rank].diag(), 1e-5)
    assert float((term.dense() - drawn()).square().sum().detach()) == pytest.approx(float(s[rank:].square().sum()))


class Blocks(nn.Module):
    """Two linear blocks with a tanh, which rules find as a model's."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(One(torch.randn(12, 12, generator=draw)) for _ in range(2)).double()

    def forward(self, x: Tensor, use_cache: bool = True) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("relative", [True, False])
def test_pela_follows_its_lines(relative):
    """Task loss, features of the blocks, and the largest entry of the error, by autograd of the plain formula."""
    options = {"ratio": 2.0, "alpha": 0.7, "relative": relative, "beta": 0.3, "eps": 1e-3}
    model, structure = Blocks(), Structure.of("pela", None, options)
    original = structure.original(model)
    W1, W2 = (layer.layer.weight.detach().clone() for layer in model.layers)
    restructure(model, structure)
    rules = structure.rules(model, 0, original)
    for rule in rules:
        rule.start(model, steps=20)
    terms = [layer.layer.terms["low_rank"] for layer in model.layers]
    plain = [p.detach().clone() for term in terms for p in (term.B, term.A)]
    mine = [p for term in terms for p in (term.B, term.A)]
    optimizer, adams = torch.optim.AdamW(mine, lr=1e-2, weight_decay=0.0), [PlainAdam() for _ in plain]
    draw = torch.Generator().manual_seed(4)
    for step in range(1, 21):
        x, y = (torch.randn(9, 12, generator=draw, dtype=torch.float64) for _ in range(2))
        loss = (model.train()(x) - y).square().mean()
        for rule in rules:
            loss = loss + rule.penalty(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for rule in rules:
            rule.after_step(model, step)
        B1, A1, B2, A2 = leaves = [p.requires_grad_(True) for p in plain]
        f1 = x @ A1.T @ B1.T
        f2 = torch.tanh(f1) @ A2.T @ B2.T
        t1 = x @ W1.T
        t2 = torch.tanh(t1) @ W2.T
        sizes = [t.square().mean() if relative else 1.0 for t in (t1, t2)]
        features = 0.5 * ((f1 - t1).square().mean() / sizes[0] + (f2 - t2).square().mean() / sizes[1])
        errors = [((B @ A - W).abs().max() - 1e-3) ** 2 for B, A, W in ((B1, A1, W1), (B2, A2, W2))]
        wanted = (torch.tanh(f2) - y).square().mean() + 0.7 * features + 0.3 * (errors[0] + errors[1]) / 2
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
        grads = torch.autograd.grad(wanted, leaves)
        plain = [(p - adam.step(g)).detach() for p, adam, g in zip(leaves, adams, grads, strict=True)]
    for one, other in zip(mine, plain, strict=True):
        close(one, other, 1e-5)
    for before, after in zip((W1, W2), original.layers, strict=True):
        assert torch.equal(before, after.layer.weight) and after.layer.weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_largest_error_is_a_target_that_moves_one_row_and_one_column():
    model = Blocks()
    structure = Structure.of("pela", None, {"eps": 10.0})
    original = structure.original(model)
    restructure(model, structure)
    rule = Perturbation(original, 2.0, 10.0)
    rule.start(model, steps=5)
    rule.penalty(model).backward()
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            W = original.get_submodule(name.removesuffix(".terms.low_rank")).weight
            R = (layer.dense() - W).detach()
            place = int(R.abs().argmax())
            p, q = place // 12, place % 12
            size = 2.0 * 2 * (float(R.abs().max()) - 10.0) * float(R[p, q].sign()) / 2  # of two matrices
            assert size * float(R[p, q]) < 0, "an error below eps is pushed up"
            close(layer.B.grad[p], size * layer.A[:, q], 1e-9)
            assert not layer.B.grad[torch.arange(12) != p].any()
            assert not layer.A.grad[:, torch.arange(12) != q].any()


def test_features_without_a_training_pass_ask_for_nothing():
    model = Blocks()
    rule = FeatureDistillation(Blocks(), 1.0, relative=True)
    rule.start(model, steps=3)
    model.eval()(torch.zeros(2, 12, dtype=torch.float64))
    assert rule.penalty(model) is None
    with pytest.raises(WeftError, match="follows the model that it goes on with: give original="):
        Structure.of("pela").rules(restructure(Blocks(), "pela"), 0)


@pytest.mark.parametrize("relative", [False, True])
def test_padding_is_no_feature(relative):
    rule = FeatureDistillation(Blocks(), 1.0, relative=relative)
    mine, theirs = torch.randn(2, 2, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for count in (2, 4):
        expected = rule.error(mine[:, :count], theirs[:, :count])
        mask = (torch.arange(5) < count).long().expand(2, 5)
        torch.testing.assert_close(rule._error(mine, theirs, mask), expected)


def test_the_mask_of_a_batch_reaches_the_rule():
    model, original = (LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    )) for _ in range(2))  # fmt: skip
    ids = torch.arange(12).view(2, 6)
    penalties = []
    for width in (4, 6):
        rule = FeatureDistillation(original, 1.0, relative=True)
        rule.start(model, steps=3)
        model.train()(input_ids=ids[:, :width], attention_mask=(torch.arange(width) < 4).long().expand(2, width))
        penalties.append(rule.penalty(model).item())
        rule.close()
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-4)


# --- N:M gradient flow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["chain", "straight"])
@pytest.mark.parametrize("decay", ["exponential", "linear", "stepwise", "geometric"])
def test_nm_gradient_flow_follows_its_lines(decay, gradient):
    options = {"n": 1, "m": 4, "decay": decay, "gradient": gradient, "dense": 0.1, "settle": 0.2}
    model = start("nm-gradient-flow", None, **options)
    W, adam, losses = drawn(), PlainAdam(), []
    for step, (x, y) in enumerate(batches(), 1):
        n, m, beta = 1, 4, 1.0  # 2 steps dense, 14 of decay, 4 settled
        if step > 16:
            beta = 0.0
        elif step > 2 and decay == "exponential":
            beta = 1e-3 ** ((step - 2) / 14)
        elif step > 2 and decay == "linear":
            beta = 1 - (step - 2) / 14
        elif step > 2:
            stages = [(3, 4), (2, 4), (1, 4)] if decay == "stepwise" else [(8, 32), (4, 16), (2, 8), (1, 4)]
            (n, m), beta = stages[(step - 3) * len(stages) // 14], 0.0
        factor = torch.full_like(W, beta)
        for row in range(OUT):
            for group in range(0, IN, m):
                order = W[row, group : group + m].abs().argsort(descending=True)
                factor[row, group + order[:n]] = 1.0
        residual = x @ (W * factor).T - y
        losses.append(float(residual.square().mean()))
        G = 2.0 / residual.numel() * residual.T @ x
        W = W - adam.step(G * factor if gradient == "chain" else G)
    assert run(model, Structure.of("nm-gradient-flow", None, options)) == pytest.approx(losses, rel=1e-8)
    close(model.layer.terms["fading"].V, W, 1e-7)


def test_the_schedules_of_patterns_end_at_the_target():
    assert patterns(1, 8, "stepwise") == [(7, 8), (4, 8), (2, 8), (1, 8)]
    assert patterns(1, 16, "stepwise")[0] == (15, 16)
    assert patterns(2, 4, "stepwise") == [(3, 4), (2, 4)]
    assert patterns(3, 8, "stepwise") == [(7, 8), (4, 8), (3, 8)]
    assert patterns(3, 4, "stepwise") == [(3, 4)] and patterns(1, 2, "stepwise") == [(1, 2)]
    assert patterns(1, 8, "geometric") == [(8, 64), (4, 32), (2, 16), (1, 8)]
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for decay in ("stepwise", "geometric"):
        masks = [largest_of(W, n, m) for n, m in patterns(1, 8, decay)]
        kept = [float((W.abs() * mask).sum()) for mask in masks]
        assert kept == sorted(kept, reverse=True)
        if decay == "stepwise":
            assert all(bool((inner <= outer).all()) for outer, inner in itertools.pairwise(masks))


def test_exactly_n_of_m_are_kept_among_equals_and_zeros():
    W = torch.zeros(3, 16)
    W[1] = 1.0
    assert bool((largest_of(W, 2, 8).view(3, 2, 8).sum(-1) == 2).all())


def test_fading_is_dense_at_one_and_evaluates_as_what_is_left():
    W = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    term, x = Fading.from_matrix(W, 2, 4).train(), torch.randn(5, 16)
    assert torch.equal(term(x), Dense.from_matrix(W)(x))
    left = Masked.from_mask(W, largest_of(W, 2, 4))
    assert torch.equal(term.eval().dense(), left.dense())


def test_the_decay_follows_the_run_and_goes_on_where_it_was():
    model = start("nm-gradient-flow", None)
    term = model.layer.terms["fading"]
    for steps in (1, 2, 20, 100, 5000):
        rule = GradientFlow(2, 4, "exponential", 0.0125, 0.1)
        rule.start(model, steps=steps)
        assert rule.at(steps) == (2, 4, 0.0)
        betas = [rule.at(step)[2] for step in range(1, steps + 1)]
        assert betas == sorted(betas, reverse=True)
        if steps >= 20:
            assert betas[0] > 0.5 and min(beta for beta in betas if beta) == pytest.approx(1e-3)
    rule.after_step(model, 2999)
    state, beta = rule.state_dict(), float(term.beta)
    rule.start(model, steps=5000)
    assert float(term.beta) == 1.0
    rule.load_state_dict(state)
    assert float(term.beta) == beta < 0.1


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("trp", {"energy": 0.0}, "energy is 0.0 and nuclear 0.01: give the share"),
        ("trp", {"nuclear": 1.0}, "nuclear 1.0"),
        ("spdf", {"sparsity": 1.0}, "sparsity is 1.0: give the share"),
        (
            "spdf",
            {"sparsity": 0.99},
            r"leaves layer \(48 x 64\) 30 entries, fewer than .*give 0.9844 or less",
        ),
        ("spdf", {"mask": "largest"}, "no choice of the mask called 'largest'"),
        ("pela", {"ratio": 0.0}, "A ratio of 0.0 gives layer"),
        ("pela", {"ratio": 100.0}, r"A ratio of 100.0 gives layer \(48 x 64\) the rank 0"),
        ("nm-gradient-flow", {"n": 4, "m": 4}, "4:4 is no pattern"),
        ("nm-gradient-flow", {"n": 2, "m": 5}, "groups of 5 entries, which do not divide the 64 inputs of layer"),
        ("nm-gradient-flow", {"n": 1, "m": 16, "decay": "geometric"}, r"groups of 128 entries \(decay geometric\)"),
        ("nm-gradient-flow", {"decay": "cosine"}, "no decay of the gradient flow called 'cosine'"),
        ("nm-gradient-flow", {"gradient": "ste"}, "no gradient of what is pruned called 'ste'"),
        ("nm-gradient-flow", {"dense": 0.5, "settle": 0.5}, "dense is 0.5 and settle 0.5"),
    ],
)
def test_wrong_options_are_sentences(method, options, sentence):
    with pytest.raises(WeftError, match=sentence):
        structure = Structure.of(method, None, options)
        structure.rules(restructure(One(drawn().float()), structure), 0)
