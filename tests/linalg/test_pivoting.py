"""Pivot rows carry all others: by least squares as the oracle, for every rank, zeros and repeated rows included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.linalg.pivoting import pivot_rows


@given(
    st.integers(0, 12), st.integers(0, 8), st.integers(0, 8), st.integers(0, 1000), st.sampled_from([1e-20, 1, 1e20])
)
def test_every_row_is_the_combination_of_the_pivot_rows(extra: int, r: int, rank: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, r)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r + extra, rank), (rank, r))
    )
    B = size * left @ right
    B[::3] = B[:1].clone()  # equal rows
    order, C = pivot_rows(B)
    assert sorted(order.tolist()) == list(range(r + extra)) and C.shape == (extra, r)
    torch.testing.assert_close(C @ B[order[:r]], B[order[r:]], atol=1e-11 * size, rtol=1e-9)


def test_the_coefficients_are_those_of_least_squares_and_small() -> None:
    B = torch.randn(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order, C = pivot_rows(B)
    oracle = torch.linalg.lstsq(B[order[:20]].mT, B[order[20:]].mT).solution.mT
    torch.testing.assert_close(C, oracle)
    assert C.abs().max() < 4  # a random choice of rows gives hundreds


@pytest.mark.parametrize(("B", "why"), [(torch.ones(2, 3), "2 x 3"), (torch.full((3, 1), torch.nan), "NaN")])
def test_what_has_no_pivot_rows_is_refused(B: torch.Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pivot_rows(B)
