"""A forward or backward pass takes nothing from the host and asks it nothing, so that a GPU never waits in one and it
can be captured as a CUDA graph.

On the meta device every tensor of the pass must be there; calls that copy numbers to a device or read them back are
seen by name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from weft.tables import table
from weft.terms import TERMS, Term
from weft.testing import example

COPIES = {
    torch.tensor,
    torch.as_tensor,
    torch.from_numpy,
    Tensor.new_tensor,
    Tensor.tolist,
    Tensor.item,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
}


class Host(TorchFunctionMode):
    """Lists what crosses between the host and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in COPIES or (isinstance(result, Tensor) and not result.is_meta):
            self.seen.append(func.__name__)
        return result


def crossings(term: Term) -> list[str]:
    """Of the second pass: the first may make tables that stay."""
    found: list[str] = []
    for _ in range(2):
        x = torch.empty(5, term.in_features, device="meta", requires_grad=True)
        with Host() as host:
            term(x).sum().backward()
            if term.linear:
                term.dense()
        found = host.seen
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", TERMS)
def test_a_pass_has_no_business_with_the_host(kind: str, training: bool) -> None:
    assert crossings(example(kind).to("meta").train(training)) == []


def test_a_copy_a_question_and_a_wandering_tensor_are_seen() -> None:
    class Careless(type(example("dense"))):
        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(self.in_features)
            return super().forward(x * torch.tensor(2.0, device=x.device))[..., : len(places.tolist())]

    careless = example("dense").to("meta")
    careless.__class__ = Careless
    assert crossings(careless) == ["arange", "tensor", "tolist"]


def test_a_table_is_made_once_a_device_and_dtype() -> None:
    calls = []

    @table
    def squares(n: int) -> list[float]:
        calls.append(n)
        return [float(i * i) for i in range(n)]

    assert squares(3).tolist() == [0.0, 1.0, 4.0] and squares(3) is squares(3)
    assert squares(3, dtype=torch.float64).dtype == torch.float64 and squares(3, device="meta").is_meta
    assert squares(4).numel() == 4 and calls == [3, 3, 3, 4]
    with torch.inference_mode():
        assert not squares(5).is_inference()
    assert not squares(5).is_inference()
