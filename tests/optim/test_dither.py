"""Stochastic rounding: always a neighbour, the right one on average, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.optim.dither import stochastic_round

NARROW = [torch.bfloat16, torch.float16]


def rounded(values: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return stochastic_round(values, dtype, torch.Generator().manual_seed(seed))


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The representable numbers around x, by brute force over all 65,536."""
    grid = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
    grid = grid[grid.isfinite()]
    return float(grid[grid <= x].max()), float(grid[grid >= x].min())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("x", [1.001, -1.001, 0.3333, 1e-6, -3e-8, 2e-8, 0.99999, -2.0003, 1234.56])
def test_both_neighbours_with_the_right_mean(dtype: torch.dtype, x: float) -> None:
    exact = float(torch.tensor(x, dtype=torch.float32))
    low, high = neighbours(exact, dtype)
    draws = rounded(torch.full((40_000,), x), dtype).double()
    assert set(draws.unique().tolist()) <= {low, high}
    share = (exact - low) / (high - low) if high > low else 0.0
    # five standard deviations of the share of draws that go up
    assert (draws == high).double().mean().item() == pytest.approx(share, abs=5 * (0.25 / 40_000) ** 0.5)


@pytest.mark.parametrize("dtype", NARROW)
def test_representable_and_special_values_stay(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -0.5, float("inf"), -float("inf"), float("nan"), 96.0])
    result = rounded(values, dtype)
    assert torch.equal(result.view(torch.int16)[:6], values.to(dtype).view(torch.int16)[:6])
    assert result[6].isnan() and result[7] == 96.0


def test_wide_dtypes_are_cast_and_seeds_decide() -> None:
    values = torch.linspace(-1, 1, 101).view(1, 101)
    assert torch.equal(rounded(values, torch.float32), values)
    assert torch.equal(rounded(values, torch.bfloat16, 1), rounded(values, torch.bfloat16, 1))
    assert not torch.equal(rounded(values, torch.bfloat16, 1), rounded(values, torch.bfloat16, 2))
    assert rounded(values.mT, torch.bfloat16).shape == (101, 1)
