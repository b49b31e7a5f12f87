"""The codes of 8 bits that moments are kept in."""

from __future__ import annotations

import pytest
import torch

import weft.optim as wo
from weft.optim.inner import _decode, _encode
from weft.optim.state import state_bytes


@pytest.mark.parametrize(
    ("code", "signed", "worst"),
    [("dynamic", True, 0.16), ("dynamic", False, 0.4), ("float8", True, 0.07), ("float8", False, 0.28)],
)
def test_codes_are_near_and_no_second_moment_vanishes(code, signed, worst):
    """Relative to the number itself, for numbers not too far below the largest of their block."""
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.square()
    near = _decode(*_encode(x, 256, signed, code), 256, signed, code)
    large = x.abs() > 0.02 * x.abs().amax()
    assert ((near - x).abs() / x.abs())[large].max() <= worst
    if not signed:
        assert bool((near >= x * (1 - 1e-6)).all()) and bool((near > 0).all())
    zeros = torch.zeros(1, 2, 40)
    assert torch.equal(_decode(*_encode(zeros, 256, signed, code), 256, signed, code), zeros)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_fp8"])
def test_a_quarter_of_the_state_and_the_same_way(name):
    """Down the same slope as AdamW, to within the codes."""
    target = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    ends = {}
    for which in ("adamw", name):
        model = torch.nn.Linear(256, 64, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = getattr(wo, which)([{"params": [("weight", model.weight)]}], lr=0.02)
        for _ in range(60):
            (model.weight - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[which] = (model.weight - target).square().mean().item(), state_bytes(optimizer)
    assert ends[name][1] < 0.27 * ends["adamw"][1]
    assert ends[name][0] == pytest.approx(ends["adamw"][0], rel=0.2)
