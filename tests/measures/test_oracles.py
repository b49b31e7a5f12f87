"""Measures against what others compute: powerlaw, WeightWatcher and scikit-dimension where they are installed, PEFT,
scipy, and slow loops that share nothing with them.
"""

from __future__ import annotations

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weft.measures import MEASURES
from weft.measures.lora_limits import Seen, degree
from weft.measures.ppl_sparsity import Curve, lost_share
from weft.measures.weight_matching import assignment, grouped_assignment, likeness, permuted
from weft.testing_grafts import tiny_decoder
from weft.testing_measures import texts


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(name: str, *given: object, **options: object) -> dict:
    return dict(MEASURES[name].value(*given, **{**MEASURES[name].defaults, **options}))


def heavy(seed: int) -> Tensor:
    """A matrix of heavy-tailed numbers."""
    return gaussian(60, 90, seed=seed) / (0.1 + gaussian(60, 90, seed=seed + 50).abs())


def others(eigenvalues: np.ndarray) -> list[float]:
    """What is installed says of the exponent. Both search the whole range of starts; powerlaw takes exponents above 3
    only where it is told to.
    """
    found = []
    try:
        import powerlaw

        found.append(powerlaw.Fit(eigenvalues, verbose=False, parameter_ranges={"alpha": [1.0, 100.0]}).alpha)
    except ImportError:
        pass
    try:
        from weightwatcher.WW_powerlaw import WWFit

        found.append(WWFit(eigenvalues).alpha)
    except ImportError:
        pass
    return found or pytest.skip("neither powerlaw nor weightwatcher is installed")


@pytest.mark.parametrize("W", [gaussian(60, 90, seed=1), heavy(2)], ids=["gaussian", "heavy"])
def test_exponents_are_those_of_powerlaw_and_weightwatcher(W: Tensor) -> None:
    """Of the whole matrix, and of windows of 30 x 30 three down and three across."""
    theirs = others(np.linalg.svd(W.numpy(), compute_uv=False) ** 2)
    assert theirs == pytest.approx([value("power-law", W)["alpha_whole"]] * len(theirs), rel=1e-9)
    corners = itertools.product(range(0, 31, 15), range(0, 61, 30))
    pooled = [np.linalg.svd(W[i : i + 30, j : j + 30].numpy(), compute_uv=False) ** 2 for i, j in corners]
    theirs = others(np.concatenate(pooled))
    ours = value("farms", W, block=30, count=3, start="any")["alpha"]
    assert theirs == pytest.approx([ours] * len(theirs), rel=1e-6)


def cube(d: int, n: int = 150) -> Tensor:
    """A cube of d dimensions in 24, turned."""
    points = torch.rand(n, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    return points @ torch.linalg.qr(gaussian(24, d))[0].mT


@pytest.mark.parametrize("d", [2, 6])
def test_dimensions_are_those_of_loops_and_of_scikit_dimension(d: int) -> None:
    H, k = cube(d), 9
    points = H.tolist()
    two, many = [], []
    for i, a in enumerate(points):
        near = sorted(math.dist(a, b) for j, b in enumerate(points) if j != i)[:k]
        two.append(math.log(near[1] / near[0]))
        many += [math.log(near[-1] / r) for r in near[:-1]]
    found = value("intrinsic-dimension", H, k=k)
    assert found["dimension_two_nn"] == pytest.approx((len(H) - 1) / sum(two), rel=1e-9)
    assert found["dimension_mle"] == pytest.approx(len(many) / sum(many), rel=1e-9)
    turned = value("intrinsic-dimension", 7 * H @ torch.linalg.qr(gaussian(24, 24, seed=3))[0] + 2, k=k)
    assert turned == pytest.approx(found, rel=1e-9), "no rotation, scale or shift"
    again = value("intrinsic-dimension", torch.cat([H.flip(0), H[:5]]), k=k)
    assert again == pytest.approx(found, rel=1e-9), "no order; a point that comes twice is one"
    skdim = pytest.importorskip("skdim")
    mle = skdim.id.MLE().fit(H.numpy(), n_neighbors=k, comb="mle").dimension_
    assert found["dimension_mle"] == pytest.approx(mle, rel=1e-9)
    assert found["dimension_two_nn"] == pytest.approx(skdim.id.TwoNN().fit(H.numpy()).dimension_, rel=0.2)


def test_intruders_are_those_that_peft_counts() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(48, 48, bias=False) for _ in range(4)))
    before = [layer.weight.detach().clone() for layer in base]
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0", "1", "2", "3"]))
    counted = []
    for size, layer in zip((0.0, 0.5, 1.5, 6.0), tuned.base_model.model, strict=True):
        layer.lora_A["default"].weight.data = torch.linalg.qr(torch.randn(48, 3))[0].mT
        layer.lora_B["default"].weight.data = size * torch.linalg.qr(torch.randn(48, 3))[0]
        W0 = layer.base_layer.weight.detach()
        counted.append(value("intruder-dimensions", W0 + layer.get_delta_weight("default").detach(), W0)["intruders"])
    lines: list[str] = []
    reduce_intruder_dimension(tuned, logging_sink=lines.append)
    said = [int(n or 0) for n in re.findall(r": (?:Intruders: (\d+)|No intruders)", "\n".join(lines))]
    assert said == counted and counted[0] == 0 and counted[-1] == 3 and len(before) == 4


@pytest.mark.parametrize("shape", [(50, 7), (12, 40)])
def test_nuclear_norms_are_numpy_s_and_bound_each_other(shape: tuple[int, int]) -> None:
    H = gaussian(*shape) * torch.arange(1, shape[1] + 1) + 3
    found = value("matrix-nuclear-norm", H)
    X = H.numpy() - H.numpy().mean(0)
    X = X / np.linalg.norm(X, axis=1, keepdims=True)
    N, d = shape
    s = np.linalg.svd(X, compute_uv=False)
    assert found["nuclear_norm_exact"] == pytest.approx(s.sum() / N, rel=1e-6)
    columns = sorted(np.linalg.norm(X, axis=0), reverse=True)
    assert found["matrix_nuclear_norm"] == pytest.approx(sum(columns[: min(N, d)]) / N, rel=1e-9)
    p = s**2 / (s**2).sum()
    assert found["matrix_entropy"] == pytest.approx(
        -sum(x * math.log(x) for x in p if x > 1e-30) / math.log(d), rel=1e-6
    )
    if d <= N:
        assert s.sum() / N <= found["matrix_nuclear_norm"] <= math.sqrt(d * N) / N + 1e-12


@pytest.mark.parametrize(("tokens", "inn", "out"), [(5, 12, 9), (30, 12, 9), (9, 12, 9)])
def test_spectra_of_gradients_are_those_of_the_gradient(tokens: int, inn: int, out: int) -> None:
    x, g = gaussian(tokens, inn), gaussian(tokens, out, seed=1)
    s = torch.linalg.svdvals(g.mT @ x)
    p = s / s.sum()
    found = value("gradient-quality", x, g)
    assert found["gradient_nuclear"] == pytest.approx(float(s.sum()), rel=1e-9)
    assert found["gradient_rank"] == pytest.approx(
        math.exp(-sum(float(q) * math.log(q) for q in p if q > 1e-14)), rel=1e-6
    )
    assert value("gradient-quality", x, 5 * g)["gradient_rank"] == pytest.approx(found["gradient_rank"], rel=1e-9)


def test_scores_of_units_are_numpy_s() -> None:
    x = gaussian(200, 6) @ gaussian(6, 6, seed=1) + 4
    moments = {"input_moment": x.mT @ x / len(x), "input_mean": x.mean(0)}
    R = np.corrcoef(x.numpy().T)
    v = np.linalg.eigvalsh(R)
    found = value("hidden-covariance", moments)
    assert found["hidden_score"] == pytest.approx(-float(np.mean(np.log(v + 1e-5) + 1 / (v + 1e-5))), rel=1e-6)
    assert found["redundancy"] == pytest.approx(float(np.mean(R[~np.eye(6, dtype=bool)] ** 2)), rel=1e-6)
    shares = np.cumsum(np.sort(np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True)))[::-1])
    expected = int(np.argmax(shares >= 0.9 * shares[-1])) + 1
    assert value("w-pca", moments, eta=0.9)["components"] == expected


def test_orders_are_the_best_of_all_and_scipy_s() -> None:
    for seed in range(5):
        C = gaussian(5, 5, seed=seed)
        best = max(itertools.permutations(range(5)), key=lambda p: sum(float(C[i, j]) for i, j in enumerate(p)))
        assert assignment(C).tolist() == list(best)
    groups, members = gaussian(3, 3), gaussian(6, 6, seed=1)

    def worth(outer: tuple[int, ...], inner: tuple[tuple[int, ...], ...]) -> float:
        total = sum(float(groups[i, j]) for i, j in enumerate(outer))
        return total + sum(float(members[2 * i + a, 2 * j + inner[i][a]]) for i, j in enumerate(outer) for a in (0, 1))

    pairs = list(itertools.product([(0, 1), (1, 0)], repeat=3))
    outer, inner = max(itertools.product(itertools.permutations(range(3)), pairs), key=lambda p: worth(*p))
    order, of_groups = grouped_assignment(groups, members)
    assert of_groups.tolist() == list(outer)
    assert order.tolist() == [2 * j + a for i, j in enumerate(outer) for a in inner[i]]


def test_columns_count_where_rows_tell_nothing() -> None:
    model = tiny_decoder()
    for block in model.model.layers:
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight.data[:] = layer.weight.data[0]
    other = copy.deepcopy(model)
    for block in other.model.layers:
        block.mlp.down_proj.weight.data = block.mlp.down_proj.weight.data.flip(1)
    found = value("weight-matching", model, other)
    assert found["model.layers.0.mlp.down_proj"] == {"moved": 1.0, "matched": pytest.approx(0, abs=1e-6)}
    assert found[""]["distance_saved"] == pytest.approx(1, abs=1e-6)


def test_the_most_alike_is_the_nearest() -> None:
    """||W - P W0||^2 = ||W||^2 + ||W0||^2 - 2 <W, P W0>, on either side."""
    W, W0 = gaussian(4, 6), gaussian(4, 6, seed=1)
    for side, n in ((0, 4), (1, 3)):
        order = assignment(likeness(W, W0, side, n))
        apart = {p: float((W - permuted(W0, side, torch.tensor(p))).norm()) for p in itertools.permutations(range(n))}
        assert apart[tuple(order.tolist())] == pytest.approx(min(apart.values()), rel=1e-9)
        s = [torch.linalg.svdvals(M) for M in (W0, permuted(W0, side, order))]
        torch.testing.assert_close(s[0], s[1])


def test_lost_shares_are_the_definition_s_and_thresholds_meet_them() -> None:
    h, W = gaussian(40, 30).float(), gaussian(8, 30, seed=1).float()
    norms = W.norm(dim=0)
    for eps in (0.0, 0.5, 2.0, math.inf):
        sparse = torch.where((h.abs() * norms) <= eps, torch.zeros_like(h), h)
        y, kept = h @ W.mT, sparse @ W.mT
        torch.testing.assert_close(
            lost_share(h, W, norms, eps), (y - kept).norm(dim=1) / y.norm(dim=1), rtol=1e-4, atol=1e-6
        )
    assert float(lost_share(h, W, norms, math.inf).mean()) == pytest.approx(1, rel=1e-5)
    top = float((h.abs() * norms).max())
    curve = Curve(norms, torch.linspace(0, top, 200, dtype=torch.float64))
    curve.add(h[:20], W)
    curve.add(h[20:], W)
    found = [curve.threshold(share) for share in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert found == sorted(found) and found[0] < 0.05 * top and found[-1] == math.inf
    for share, eps in zip((0.1, 0.3, 0.6), found[1:], strict=False):
        assert float(lost_share(h, W, norms, eps).mean()) == pytest.approx(share, abs=0.02)


def test_a_relu_s_zeros_are_off_at_no_cost() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    config.word_embed_proj_dim = 16
    model = OPTForCausalLM(config).eval()
    ids = torch.randint(3, 40, (1, 30))
    zeros: dict[str, float] = {}
    for i, block in enumerate(model.model.decoder.layers):
        block.fc2.register_forward_pre_hook(
            lambda m, args, i=i: zeros.update({str(i): float((args[0] == 0).float().mean())})
        )
    model(ids)
    found = value("ppl-sparsity", model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], percent=0.0)
    shares = [row["sparsity"] for name, row in found.items() if name]
    assert found[""]["ppl_ratio"] <= 1 and min(a - b for a, b in zip(shares, zeros.values(), strict=True)) > -1e-6


def test_degrees_are_those_of_a_search_over_the_interval() -> None:
    assert [degree(b) for b in (0.5, 1, 2, 4)] == [2, 4, 7, 14]
    for bound in (0.3, 1.7):
        x = torch.linspace(-bound, bound, 2001, dtype=torch.float64)
        sums = [sum(x**m / math.factorial(m) for m in range(n + 1)) for n in range(12)]
        assert degree(bound) == next(n for n, p in enumerate(sums) if ((p - x.exp()).abs() <= 0.05 * x.exp()).all())


def test_largest_logits_are_those_of_the_whole_matrix() -> None:
    """Streamed by blocks and kept from what is masked, with two query heads on a key; and Hoelder's bound."""
    q, k = gaussian(1, 4, 600, 8).float(), gaussian(1, 2, 600, 8, seed=1).float()
    q[0, 0, 3], k[0, 0, 500] = 50.0, 50.0  # what query 3 must not see
    k[:, :, 0], k[:, :, 1] = 30 * k[:, :, 0], 20 * k[:, :, 1]  # the largest, and the largest of the rest
    mask = torch.zeros(1, 1, 600, 600).masked_fill(torch.ones(600, 600).triu(1).bool(), torch.finfo(torch.float32).min)
    seen = Seen()
    seen.add(q, k, mask, 0.5)
    logits = (q @ k.repeat_interleave(2, 1).mT * 0.5).tril().abs()
    torch.testing.assert_close(seen.all, logits.amax((0, 2, 3)))
    torch.testing.assert_close(seen.rest, logits[..., 1:].amax((0, 2, 3)))
    found = seen.figures()
    assert found["query_max"] == 50 and found["logit_bound"] <= 50 * 50 * 8 * 0.5


def test_watching_attention_changes_nothing() -> None:
    model, (text, *_) = tiny_decoder(), texts()
    before, how = model(**text).logits, model.config._attn_implementation
    value("lora-limits", model, [text])
    assert model.config._attn_implementation == how and torch.equal(model(**text).logits, before)
