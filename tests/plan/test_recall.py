"""What is recalled of a call is what the call gives, of tensors with values as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.memory.live import tensors_in
from weft.plan.recall import recalled
from weft.plan.supposed import Supposed

CALLS = {
    "view": lambda x: x.view(2, -1),
    "transpose": lambda x: x.mT,
    "transposed, then copied": lambda x: x.mT.contiguous(),
    "contiguous already": lambda x: x.contiguous(),
    "cast to what it is": lambda x: x.to(x.dtype),
    "cast": lambda x: x.to(torch.bfloat16),
    "in place": lambda x: x.add_(1),
    "a row": lambda x: x[1:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 5),
    "split": lambda x: x.split(2, dim=-1),
    "unbound": lambda x: x.unbind(0),
    "product": lambda x: x @ x.mT,
    "product into another": lambda x: torch.mm(x, x.mT, out=x.detach()[:, :4].contiguous()),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "factors": lambda x: torch.linalg.svd(x, full_matrices=False),
    "the transpose of a factor": lambda x: torch.linalg.svd(x, full_matrices=False)[2].mT[:, :2],
    "concatenated": lambda x: torch.cat([x, x]),
    "of other types": lambda x: (x * 1, x.int() * 1, x.int() * 1.0, x > 0),
}


def facts(found: object, given: Tensor) -> list[object]:
    """Shape, strides, dtype, and where the numbers lie: in the given tensor, or by themselves."""
    own = given.untyped_storage()._cdata
    return [
        (x is given, x.shape, x.stride(), x.storage_offset(), x.dtype, x.untyped_storage()._cdata == own)
        for x in tensors_in(found)
    ]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_that_is_recalled_gives_what_it_gave(call, monkeypatch):
    made = []
    dispatch = FakeTensorMode.dispatch
    monkeypatch.setattr(FakeTensorMode, "dispatch", lambda *args, **rest: made.append(1) or dispatch(*args, **rest))
    real = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    wanted = facts(call(real), real)
    for _ in range(2):
        with FakeTensorMode(), Supposed():
            x = torch.empty(4, 6)
            made.clear()
            assert facts(call(x), x) == wanted
    assert not made


def test_what_depends_on_values_or_changes_a_shape_is_called_each_time():
    called = []

    def calls(func, *args):
        called.append(func)
        return func(*args)

    with FakeTensorMode():
        x = torch.empty(4, 6)
        for _ in range(2):
            recalled(torch.ops.aten.resize_.default, (x, [4, 12]), {})
            assert x.shape == (4, 12)
            recalled(torch.ops.aten.resize_.default, (x, [4, 6]), {})
            assert x.shape == (4, 6)
            small = torch.empty(0)
            recalled(torch.ops.aten.mm.out, (x, torch.empty(6, 3)), {"out": small})
            assert small.shape == (4, 3)
            recalled(calls, (torch.ops.aten.add.Tensor, x, x), {})
    assert len(called) == 2, "what is no call of torch is not recalled"


def test_values_stay_with_their_tensors():
    with FakeTensorMode() as mode, Supposed():
        one = torch.ones(2)
        (one + one).add_(1)
        a, b = (torch.empty(3, requires_grad=True) for _ in range(2))
        loss = (a * b).sum()
        loss.backward()
        assert a.grad.shape == b.grad.shape == (3,) and a.grad is not b.grad
        assert a.grad.fake_mode is mode
