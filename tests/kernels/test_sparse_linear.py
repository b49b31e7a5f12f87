"""A sparse matrix multiplied by its entries alone, and by the whole of it: one function, the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from weft.kernels import sparse_linear as module
from weft.kernels.lean_linear import Entries, Factor, linear
from weft.kernels.sparse_linear import DENSITY, entries_alone, scatter_dense, sparse_linear
from weft.terms import LowRank, Sparse, SumLinear

OUT, IN = 30, 40


def sparse(density=0.05, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    positions = torch.randperm(OUT * IN, generator=g)[: int(density * OUT * IN)].sort().values.int()
    return torch.randn(len(positions), generator=g, dtype=dtype), positions


def draw(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_matrix(x, values, positions):
    return x @ scatter_dense(values, positions, OUT, IN).mT


@pytest.mark.parametrize("tokens", [1, 3, module.TOKENS, 2 * module.TOKENS + 5])
@pytest.mark.parametrize("density", [0.002, 0.05, 0.4])
def test_products_and_gradients_are_those_of_the_matrix(tokens, density):
    values, positions = sparse(density)
    assert entries_alone(values, OUT, IN) == (density <= DENSITY)
    x, g = draw(tokens, IN).requires_grad_(), draw(tokens, OUT, seed=2)
    values.requires_grad_()
    y, expected = sparse_linear(x, values, positions, OUT), by_matrix(x, values, positions)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found, right = (torch.autograd.grad(out, [x, values], g) for out in (y, expected))
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (33, 65), (256, 100)])
def test_a_transpose_lies_in_memory_of_its_own(shape, dtype):
    rows = draw(shape[0], 2 * shape[1], dtype=dtype)
    for part in (rows[:, : shape[1]], rows[:, ::2], rows[:1, : shape[1]].expand(shape), draw(*shape[::-1]).mT):
        found = module._transposed(part)
        assert found.is_contiguous() and found.data_ptr() != part.data_ptr()
        torch.testing.assert_close(found, part.mT, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [("x",), ("values",), ("x", "values")])
def test_only_what_is_trained_gets_a_gradient(wanted):
    values, positions = sparse()
    tensors = {"x": draw(2, 3, IN), "values": values}
    for name in wanted:
        tensors[name].requires_grad_()
    y = sparse_linear(tensors["x"], tensors["values"], positions, OUT)
    found = torch.autograd.grad(y.square().sum(), [tensors[name] for name in wanted])
    right = torch.autograd.grad(
        by_matrix(tensors["x"], tensors["values"], positions).square().sum(), [tensors[name] for name in wanted]
    )
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


def test_a_probe_gets_the_dense_gradient():
    values, positions = sparse()
    x, probe = draw(7, IN), torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    found, of_values = torch.autograd.grad(
        sparse_linear(x, values, positions, OUT, probe).square().sum(), [probe, values]
    )
    W = scatter_dense(values.detach(), positions, OUT, IN).requires_grad_()
    (right,) = torch.autograd.grad((x @ W.mT).square().sum(), [W])
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(of_values, right.flatten()[positions.long()], rtol=1e-11, atol=1e-11)


def test_the_support_is_made_once_and_anew_where_positions_change(monkeypatch):
    made = []
    real = module._Support
    monkeypatch.setattr(module, "_Support", lambda *args: made.append(1) or real(*args))
    values, positions = sparse()
    values.requires_grad_()
    x = draw(5, IN)
    for _ in range(3):
        sparse_linear(x, values, positions, OUT).sum().backward()
    assert len(made) == 1
    other = sparse(seed=3)[1]
    positions.copy_(other)
    torch.testing.assert_close(sparse_linear(x, values, positions, OUT), by_matrix(x, values, other))
    assert len(made) == 2


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_entries_beside_factors_in_one_node(based, scale):
    values, positions = sparse()
    t = {
        "B": draw(OUT, 3),
        "A": draw(3, IN, seed=4),
        "values": values,
        "x": draw(6, IN, seed=5),
        "b": draw(OUT, seed=6),
    }
    for tensor in t.values():
        tensor.requires_grad_()
    W = draw(OUT, IN, seed=7) if based else None
    for parts in ([Factor(t["B"], t["A"], 2.0)], []):
        entries = Entries(t["values"], positions, OUT, IN, scale)
        for order in ([*parts, entries], [entries, *parts]):
            total = sum(part.matrix() for part in order) + (0 if W is None else W)
            used = [tensor for name, tensor in t.items() if parts or name not in "BA"]
            found, right = linear(t["x"], W, t["b"], order), t["x"] @ total.mT + t["b"]
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
            g = draw(6, OUT, seed=8)
            one, other = (torch.autograd.grad(y, used, g) for y in (found, right))
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_layer_of_factors_and_few_entries_builds_no_matrix():
    values, positions = sparse()
    layer = SumLinear(
        {"low_rank": LowRank.from_factors(draw(OUT, 3), draw(3, IN)), "sparse": Sparse(IN, OUT, len(values))}
    )
    layer.double()
    with torch.no_grad():
        layer.terms["sparse"].values.copy_(values)
        layer.terms["sparse"].positions.copy_(positions)
    x = draw(600, IN)
    assert layer.fused(x) is None
    torch.testing.assert_close(layer(x), x @ layer.dense(torch.float64).mT, rtol=1e-11, atol=1e-11)
    assert copy.deepcopy(layer).to(torch.bfloat16).fused(x.bfloat16()) is not None, "narrow numbers go by the matrix"


def test_planned_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        term = Sparse(IN, OUT, 20)
        x = torch.randn(600, IN, requires_grad=True)
        term(x).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape and term.values.grad is not None
