"""The value is exact, and the gradient is that of the other tensor, whole."""

from __future__ import annotations

import pytest
import torch

from weft.kernels.straight_through import straight_through


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_value_and_the_gradient(dtype, compiled):
    run = torch.compile(straight_through, backend="aot_eager") if compiled else straight_through
    x = (torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 1e4).to(dtype).requires_grad_()
    value = torch.full_like(x, 1 / 3).requires_grad_()  # far from x, where value + (x - x) in this order would round
    found = run(value, x)
    assert torch.equal(found, value) and found.dtype == dtype
    (found * 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3)) and value.grad is None


def test_a_tensor_that_is_not_trained_needs_no_graph():
    x = torch.randn(3)
    assert not straight_through(x.round(), x).requires_grad


def test_neither_tensor_changes():
    x = torch.randn(4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = x.detach().clone()
    value = x.detach()
    straight_through(value, x).sum().backward()
    assert torch.equal(x.detach(), before)
