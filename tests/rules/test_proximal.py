"""The proximal step against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import WeftError
from weft.rules.proximal import Proximal, released_threshold, soft_threshold


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
    rule = Proximal("default", xi=[0.0, 0.1, 0.2], every=10)
    assert [rule.threshold(step) for step in (1, 10, 11, 20, 21, 99)] == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    with pytest.raises(WeftError, match="every="):
        Proximal("default", xi=[0.0, 0.1])
    with pytest.raises(WeftError, match="from 0 on"):
        Proximal("default", xi=-1.0)
