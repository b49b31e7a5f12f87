"""Spectron: the product of two factors never moves further than the bound, and matrices alone take Muon's steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.methods.one_layer import One, close
from weft.optim import spectron
from weft.optim.spectron import norm_bound, orthogonal, products
from weft.terms import LowRank
from weft.verbs.fresh import restructure


def model(rank: int = 6) -> nn.ModuleList:
    draw = torch.Generator().manual_seed(0)
    one = nn.ModuleList([One(torch.randn(24, 16, generator=draw)), One(torch.randn(16, 12, generator=draw))])
    restructure(one[0], "low-rank", rank, std=0.5)
    return one.double()


def backward(net: nn.ModuleList, step: int) -> None:
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    (net[0](x).square().mean() + (net[1](x[:, :12]) - 1).square().mean()).backward()


def norm(M: Tensor) -> float:
    return float(torch.linalg.matrix_norm(M.detach(), 2))


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_the_product_moves_no_further_than_eta(lr, adjust):
    net = model()
    term = net[0].layer.terms["low_rank"]
    optimizer, moved = spectron(net, lr, adjust=adjust), []
    eta = lr * (0.2 * math.sqrt(24) if adjust == "match_rms_adamw" else 1.0)
    for step in range(12):
        before = term.dense().detach().clone()
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
        moved.append(norm(term.dense() - before) / eta)
    assert max(moved) <= 1.0, moved
    assert min(moved) > 0.2, "so short a step is no use"


def test_spectron_follows_its_lines():
    net, lr, mu = model(), 1e-2, 0.95
    term, plain = net[0].layer.terms["low_rank"], net[1].layer
    B, A, W = (t.detach().clone() for t in (term.B, term.A, plain.weight))
    moments = [torch.zeros_like(t) for t in (B, A, W)]
    optimizer = spectron(net, lr, weight_decay=0.1)
    for step in range(20):
        x = torch.randn(9, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        leaves = [t.requires_grad_(True) for t in (B, A, W)]
        loss = (x @ A.T @ B.T).square().mean() + (x[:, :12] @ W.T - 1).square().mean()
        grads = torch.autograd.grad(loss, leaves)
        moments = [mu * m + (1 - mu) * g for m, g in zip(moments, grads, strict=True)]
        O = [orthogonal((1 - mu) * g + mu * m) for m, g in zip(moments, grads, strict=True)]
        with torch.no_grad():
            rho = lr * 0.2 * 24**0.5 / (norm_bound(A) + norm_bound(B) + 1)
            B, A = (t * (1 - lr * 0.1) - rho * o for t, o in ((B, O[0]), (A, O[1])))
            W = W * (1 - lr * 0.1) - lr * 0.2 * 16**0.5 * O[2]
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
    for mine, other in ((term.B, B), (term.A, A), (plain.weight, W)):
        close(mine, other, 1e-9)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (16, 16)])
def test_orthogonal_is_near_the_polar_factor_and_within_one(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()
    s = torch.linalg.svdvals(orthogonal(M))
    assert float(s.max()) <= 1 + 1e-12 and float(s.min()) > 0.5
    U, _, V = torch.linalg.svd(M, full_matrices=False)
    assert float((U.T @ orthogonal(M) @ V.T).diag().min()) > 0.5
    assert not orthogonal(torch.zeros(shape)).any()


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (1, 5)])
def test_the_bound_of_the_norm_is_above_it_and_near(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).double()
    for size in (1e-6, 1.0, 1e6):
        assert (
            norm(size * M) * (1 - 1e-12) <= float(norm_bound(size * M)) <= norm(size * M) * 8 ** (1 / 64) * (1 + 1e-9)
        )
    assert 0 <= float(norm_bound(torch.zeros(shape))) < 0.1


def test_factors_of_one_term_are_found_and_others_stand_alone():
    net = model()
    named = [(name, p) for name, p in net.named_parameters() if p.dim() == 2]
    found = {tuple(named[i][0] for i in places) for places in products(named)}
    stem = "0.layer.terms.low_rank"
    assert found == {(f"{stem}.B", f"{stem}.A"), ("1.layer.weight",)}
    assert isinstance(net[0].layer.terms["low_rank"], LowRank)
