"""Spectrum measures against their definitions, written out with numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.linalg.spectrum import effective_rank, energy_curve, nuclear_norm, rank_for_energy, stable_rank

spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@given(spectra)
@settings(max_examples=50, deadline=None)
def test_definitions(s: Tensor) -> None:
    values = s.numpy()
    assert stable_rank(s) == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-12)
    assert effective_rank(s) == pytest.approx(np.exp(scipy.stats.entropy(values)), rel=1e-9)
    assert nuclear_norm(s) == pytest.approx(values.sum(), rel=1e-12)
    np.testing.assert_allclose(energy_curve(s), np.cumsum(values**2) / (values**2).sum(), rtol=1e-12)


@given(spectra, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_rank_for_energy_is_the_smallest_that_reaches_the_share(s: Tensor, share: float) -> None:
    squares = (s / s[0]).square().tolist()
    rank = rank_for_energy(s, share)
    assert sum(squares[:rank]) >= share * sum(squares) * (1 - 1e-12)
    assert rank == 0 or sum(squares[: rank - 1]) < share * sum(squares) * (1 + 1e-12)


@given(spectra, st.sampled_from([1e-150, 1e150]))
@settings(max_examples=30, deadline=None)
def test_ranks_do_not_depend_on_scale(s: Tensor, scale: float) -> None:
    assert stable_rank(s * scale) == pytest.approx(stable_rank(s), rel=1e-9)
    assert effective_rank(s * scale) == pytest.approx(effective_rank(s), rel=1e-9)
    assert rank_for_energy(s * scale, 0.5) == rank_for_energy(s, 0.5)


@given(spectra)
@settings(max_examples=30, deadline=None)
def test_ranks_lie_between_one_and_the_count(s: Tensor) -> None:
    assert 1 - 1e-9 <= stable_rank(s) <= effective_rank(s) * (1 + 1e-9) <= len(s) * (1 + 2e-9)


def test_flat_spectrum() -> None:
    s = torch.full((7,), 3.0)
    assert stable_rank(s) == pytest.approx(7) and effective_rank(s) == pytest.approx(7)
    assert rank_for_energy(s, 1.0) == 7 and rank_for_energy(s, 0.5) == 4


@pytest.mark.parametrize("s", [torch.zeros(4), torch.empty(0)])
def test_nothing_has_no_rank(s: Tensor) -> None:
    assert stable_rank(s) == effective_rank(s) == nuclear_norm(s) == rank_for_energy(s, 0.9) == 0
    assert not energy_curve(s).any()


def test_half_precision_spectra() -> None:
    s = torch.tensor([60000.0, 30000.0], dtype=torch.float16)
    assert stable_rank(s) == pytest.approx(1.25) and nuclear_norm(s) == 90000


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_outside_zero_to_one_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        rank_for_energy(torch.ones(3), share)
