"""SinkGD against the literal iteration, against Sinkhorn's algorithm, and the invariances that follow."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.base import Rows
from weft.optim.sinkgd import MultiNorm, sign, sinkgd


def normalise(G: Tensor, iterations: int = 5, norms: tuple[str, ...] = ("row", "column")) -> Tensor:
    X, factor = MultiNorm(norms, iterations).update(G.unsqueeze(0), {}, 1.0, Rows(G.shape[0]))
    assert factor == 1.0
    return X[0]


def literal(G: Tensor, iterations: int) -> Tensor:
    """SR-Sinkhorn as published: rewrite X, rows first, columns last."""
    out, inside = G.shape
    X = G.clone()
    for _ in range(iterations):
        X = math.sqrt(inside) * X / X.norm(dim=1, keepdim=True)
        X = math.sqrt(out) * X / X.norm(dim=0, keepdim=True)
    return X


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_gradients_in_half_precision(dtype: torch.dtype) -> None:
    G = matrix(512, 512, 0).to(dtype)
    found, exact = normalise(G), normalise(G.double())
    assert (found.double() - exact).norm() < 1e-5 * exact.norm()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**16))
def test_equals_the_literal_iteration_and_has_the_prescribed_sizes(rows: int, columns: int, L: int, seed: int) -> None:
    G = matrix(rows, columns, seed)
    X = normalise(G, L)
    torch.testing.assert_close(X, literal(G, L), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(X.norm(dim=0), torch.full((columns,), math.sqrt(rows), dtype=X.dtype))
    assert X.square().mean().item() == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(X.sign(), G.sign())


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 2**16), st.floats(-30, 30))
def test_does_not_depend_on_the_scale_of_the_gradient_or_of_its_rows(m: int, n: int, seed: int, power: float) -> None:
    G = matrix(m, n, seed)
    X = normalise(G)
    torch.testing.assert_close(normalise(G * 10.0**power), X, rtol=1e-10, atol=1e-10)
    scale = torch.rand(m, 1, generator=torch.Generator().manual_seed(seed), dtype=G.dtype) + 0.1
    torch.testing.assert_close(normalise(scale * G), X, rtol=1e-10, atol=1e-10)


def test_squares_are_sinkhorns_algorithm() -> None:
    G = matrix(7, 5, 0)
    S = G.square()
    for _ in range(5):
        S = S * (5.0 / S.sum(1, keepdim=True))
        S = S * (7.0 / S.sum(0, keepdim=True))
    torch.testing.assert_close(normalise(G).square(), S, rtol=1e-12, atol=1e-12)


def test_rows_converge_as_the_card_measured() -> None:
    errors = [(normalise(matrix(48, 96, 3), L).norm(dim=1) / math.sqrt(96) - 1).abs().max().item() for L in (1, 2, 5)]
    assert errors[0] > 20 * errors[1] > 1e4 * errors[2]
    assert errors[2] < 1e-5


def test_transposing_agrees_only_in_the_limit() -> None:
    G = matrix(12, 20, 5)
    early = (normalise(G.mT, 1).mT - normalise(G, 1)).abs().max()
    assert early > 1e-3
    torch.testing.assert_close(normalise(G.mT, 200).mT, normalise(G, 200), rtol=1e-10, atol=1e-10)


def test_closed_forms() -> None:
    rank_one = torch.outer(matrix(6, 1, 1).squeeze(), matrix(1, 4, 2).squeeze())
    torch.testing.assert_close(normalise(rank_one, 1), rank_one.sign())
    diagonal = torch.diag(torch.tensor([3.0, -0.1, 7.0, 1e-3], dtype=torch.float64))
    torch.testing.assert_close(normalise(diagonal), 2.0 * diagonal.sign())


def test_zero_rows_and_rounding_noise_stay_zero() -> None:
    G = matrix(6, 5, 4)
    G[1], G[:, 2], G[3] = 0.0, 0.0, 1e-9 * G[3]
    X = normalise(G)
    assert torch.isfinite(X).all()
    assert not X[1].any() and not X[:, 2].any() and not X[3].any()
    assert normalise(torch.zeros(3, 4)).eq(0).all()
    kept = torch.tensor([0, 2, 4, 5])
    expected = literal(G[kept][:, [0, 1, 3, 4]], 5)
    # absent rows and columns only change the targets sqrt(n), sqrt(m)
    ratio = X[kept][:, [0, 1, 3, 4]] / expected
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-10, atol=0)


def test_other_norms() -> None:
    G = matrix(6, 9, 8)
    torch.testing.assert_close(normalise(G, 3, ("max",)), G.sign())
    X = normalise(G, 1, ("spectral",))
    torch.testing.assert_close(torch.linalg.svdvals(X), torch.full((6,), 3.0, dtype=X.dtype))
    torch.testing.assert_close(normalise(G, 1, ("row",)), 3.0 * G / G.norm(dim=1, keepdim=True))
    swan = normalise(G, 1, ("row", "spectral"))
    U, _, Vh = torch.linalg.svd(G / G.norm(dim=1, keepdim=True), full_matrices=False)
    torch.testing.assert_close(swan, 3.0 * U @ Vh)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 8),
            "blocks": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)]),
            "head": nn.Linear(6, 11),
        }
    )
    return net.to(dtype)


def set_grads(net: nn.Module, seed: int) -> None:
    for number, p in enumerate(net.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + number)).to(p.dtype)


def test_the_preset_normalises_matrices_and_gives_adamw_to_the_rest() -> None:
    net, twin = model(torch.float64), model(torch.float64)
    opt = sinkgd(net, lr=0.02)
    matrices = [layer.weight for layer in net["blocks"]]
    rest = [
        p
        for p in twin.parameters()
        if not any(p.shape == m.shape and p is w.weight for m, w in zip(matrices, twin["blocks"], strict=True))
    ]
    adam = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.0)
    for seed in range(5):
        set_grads(net, seed)
        set_grads(twin, seed)
        with torch.no_grad():
            for layer in twin["blocks"]:
                layer.weight -= 0.001 * literal(layer.weight.grad, 5)
        opt.step()
        adam.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    moments = sum(p.numel() for p in rest) * 2 * 8
    counters = opt.state_bytes() - moments
    # no moments for matrices, only a few counters for each parameter
    assert 0 <= counters <= 64 * sum(1 for _ in net.parameters())


def test_sign_moves_every_entry_by_lr_alpha() -> None:
    net = model(torch.float64)
    before = [layer.weight.detach().clone() for layer in net["blocks"]]
    set_grads(net, 1)
    sign(net, lr=0.02, alpha=0.05).step()
    for layer, old in zip(net["blocks"], before, strict=True):
        torch.testing.assert_close(layer.weight, old - 0.001 * layer.weight.grad.sign())


def test_sinkgd_trains() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(256, 8)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    opt = sinkgd(net, lr=0.05)
    losses = []
    for _ in range(150):
        opt.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", [sinkgd, sign])
def test_resume_is_exact(preset: object, dtype: torch.dtype) -> None:
    assert callable(preset)
    nets = [model(dtype), model(dtype)]
    opts = [preset(net, rounding="stochastic") for net in nets]
    for seed in range(20):
        for net, opt in zip(nets, opts, strict=True):
            set_grads(net, seed)
            opt.step()
    file = io.BytesIO()
    torch.save(opts[1].state_dict(), file)
    file.seek(0)
    opts[1] = preset(nets[1], rounding="stochastic")
    opts[1].load_state_dict(torch.load(file, weights_only=True))
    for seed in range(20, 40):
        for net, opt in zip(nets, opts, strict=True):
            set_grads(net, seed)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_mistakes_are_answered_in_a_sentence() -> None:
    with pytest.raises(WeftError, match="only matrices have rows and columns"):
        sinkgd([{"params": [nn.Parameter(torch.zeros(3))], "rank": 1}])
    with pytest.raises(WeftError, match="no norm called 'rows'"):
        MultiNorm(("rows",))
    with pytest.raises(WeftError, match="leave the rank out"):
        sinkgd(model(), rank=4)
    with pytest.raises(WeftError, match="one iteration"):
        MultiNorm(iterations=0)
    net = model()
    opt = sinkgd(net, nonfinite="raise")
    set_grads(net, 0)
    net["blocks"][0].weight.grad[0, 0] = torch.nan
    with pytest.raises(WeftError, match="not finite"):
        opt.step()
    with pytest.raises(WeftError, match="another optimizer"):
        opt.load_state_dict(sign(model()).state_dict())
