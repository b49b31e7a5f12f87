"""The proximal step against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.errors import WeftError
from weft.rules.proximal import Proximal, released_threshold, soft_threshold
from weft.terms import Spectral


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8), st.floats(0, 1))
def test_soft_threshold_minimises_its_objective(values: list[float], xi: float) -> None:
    """argmin_z (z - g)^2 / 2 + xi |z| is g - xi, g + xi or 0, whichever side of the threshold g is on."""
    g = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor([v - xi if v > xi else v + xi if v < -xi else 0.0 for v in values], dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(g, xi), expected, atol=1e-12, rtol=0)


def test_the_released_operator_zeroes_up_to_twice_the_threshold() -> None:
    g = torch.tensor([0.05, 0.15, 0.19, 0.25, -0.15, -0.25])
    torch.testing.assert_close(released_threshold(g, 0.1), torch.tensor([0, 0, 0, 0.15, 0, -0.15]))
    torch.testing.assert_close(soft_threshold(g, 0.1), torch.tensor([0, 0.05, 0.09, 0.15, -0.05, -0.15]))


def test_thresholds_follow_the_list() -> None:
    rule = started([0.0, 0.1, 0.2], every=10, steps=99)
    assert [rule.threshold(step) for step in (1, 10, 11, 20, 21, 99)] == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    rule = started([0.0, 0.1, 0.2], steps=9)
    assert [rule.threshold(step) for step in (1, 3, 4, 6, 7, 9)] == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    with pytest.raises(WeftError, match="The start of the last threshold .* is 20 steps and the run has 20"):
        started([0.0, 0.1, 0.2], every=10, steps=20)
    with pytest.raises(WeftError, match="from 0 on"):
        Proximal(-1.0)


def test_the_default_threshold_closes_three_gates_of_ten_in_a_short_run() -> None:
    """Those of a standard normal gate that learns nothing; the published 3e-4 where the run is long."""
    g = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for steps in (40, 200):
        rule = started(None, gates=g.clone(), steps=steps)
        for step in range(1, steps + 1):
            rule.after_step(torch.nn.Identity(), step)
        assert float((rule.gates[0] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert started(None, steps=10_000).threshold(1) == 3e-4
    with pytest.raises(WeftError, match="follows the length of the run"):
        started(None)


def started(xi: object, *, steps: int | None = None, gates: Tensor | None = None, **options: Any) -> Proximal:
    """The rule on one term with these gates."""
    s = torch.ones(2) if gates is None else gates
    term = Spectral.from_factors(torch.ones(3, len(s)), s, torch.ones(len(s), 4))
    rule = Proximal(xi, **options)
    rule.start(torch.nn.Identity(), {"layer": {"default": term}}, steps=steps)
    return rule
