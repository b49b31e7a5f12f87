"""One autograd node for a sum of terms: gradients of the plain formula, and nothing kept that is not needed."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from weft.kernels.lean_linear import Factor, frozen_linear, linear
from weft.kernels.recompute import recompute, source_of

N, IN, OUT, RANK = 5, 7, 6, 2


def tensors(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (2, N, IN),
        "W": (OUT, IN),
        "b": (OUT,),
        "B1": (OUT, RANK),
        "A1": (RANK, IN),
        "B2": (OUT, 1),
        "A2": (1, IN),
    }
    return {name: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def plain(t):
    return F.linear(t["x"], t["W"] + 0.5 * t["B1"] @ t["A1"] - 2.0 * t["B2"] @ t["A2"], t["b"])


def lean(t):
    return linear(t["x"], t["W"], t["b"], [Factor(t["B1"], t["A1"], 0.5), Factor(t["B2"], t["A2"], -2.0)])


@pytest.mark.parametrize("trained", [*itertools.combinations(["x", "W", "b", "B1", "A1", "A2"], 2), tuple(tensors())])
def test_gradients_for_any_choice_of_trained_tensors(trained):
    t = tensors()
    for name in trained:
        t[name].requires_grad_()
    upstream = torch.randn(2, N, OUT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = [t[name] for name in trained]
    expected, found = (torch.autograd.grad(f(t), chosen, upstream) for f in (plain, lean))
    torch.testing.assert_close(lean(t), plain(t), rtol=1e-12, atol=1e-12)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    t = {name: value.requires_grad_() for name, value in tensors().items()}
    assert torch.autograd.gradcheck(lambda *values: lean(dict(zip(t, values, strict=True))), tuple(t.values()))


def saved_by(node):
    return [t for t in node.saved_tensors if t is not None]


def test_frozen_weights_keep_no_activation():
    t = tensors()
    t["x"].requires_grad_()
    sizes = {s.numel() for s in saved_by(lean(t).grad_fn)}
    assert t["x"].numel() not in sizes and 2 * N * RANK not in sizes
    y = frozen_linear(t["x"], lambda dtype: t["W"].to(dtype))
    assert saved_by(y.grad_fn) == []
    y.sum().backward()
    torch.testing.assert_close(t["x"].grad, t["W"].sum(0).expand(2, N, IN))


def test_a_frozen_code_is_made_again_in_backward_and_never_kept():
    t, calls = tensors(), []
    t["x"].requires_grad_()

    def weight(dtype):
        calls.append(dtype)
        return t["W"].to(dtype)

    y = linear(t["x"], weight)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


def test_the_source_is_kept_in_place_of_a_recomputed_input():
    t = tensors()
    x, W = t["x"].requires_grad_(), t["W"].requires_grad_()
    runs = []

    def norm(v):
        runs.append(1)
        return F.layer_norm(v, (IN,))

    y = recompute(norm, (x,))
    outputs = [linear(y, W) for _ in range(3)]
    kept = outputs[0].grad_fn.saved_tensors
    assert any(s.data_ptr() == x.data_ptr() for s in kept) and not any(s.data_ptr() == y.data_ptr() for s in kept)
    sum(outputs).pow(2).sum().backward()
    assert len(runs) == 2  # forward, and once for three consumers and the norm itself
    grads = x.grad, W.grad
    x.grad = W.grad = None
    (3 * F.linear(F.layer_norm(x, (IN,)), W)).pow(2).sum().backward()
    torch.testing.assert_close(grads, (x.grad, W.grad), rtol=1e-12, atol=1e-12)


def test_recompute_gives_gradients_to_its_parameters_and_inputs():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    p = torch.nn.Parameter(torch.randn(3, generator=g, dtype=torch.float64))
    found = torch.autograd.grad(recompute(lambda u, v: torch.sin(u) * v * p, (a, b), (p,)).sum(), (a, b, p))
    expected = torch.autograd.grad((torch.sin(a) * b * p).sum(), (a, b, p))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_double_backward_is_refused():
    t = tensors()
    t["x"].requires_grad_()
    (grad,) = torch.autograd.grad(lean(t).pow(2).sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_computes_in_its_dtype():
    t = tensors(torch.float32)
    x, A1 = t["x"].requires_grad_(), t["A1"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lean(t)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == A1.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), plain(t), rtol=0.05, atol=0.1)


def test_a_plain_tensor_is_its_own_source():
    x = torch.ones(2)
    assert source_of(x).recipe is None and source_of(x).tensors[0] is x
