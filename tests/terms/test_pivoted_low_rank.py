"""The pivoted form: the product of its factors in fewer numbers, of any rank up to the number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.terms import LowRank, PivotedLowRank
from weft.testing import check_term


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 5, 9, 12])
def test_it_is_the_product_of_the_factors(rank: int) -> None:
    B, A = normal(12, rank), normal(rank, 9, seed=1)
    check_term(lambda: PivotedLowRank.from_factors(B, A), B @ A)


def test_a_component_of_size_zero_does_no_harm() -> None:
    B, A = normal(12, 4), normal(4, 9, seed=1)
    B[:, 1], B[:, 3] = 0, B[:, 2]
    torch.testing.assert_close(PivotedLowRank.from_factors(B, A).dense().detach(), B @ A)


def test_numbers_and_bytes() -> None:
    term = PivotedLowRank.from_factors(normal(12, 5).bfloat16(), normal(5, 9).bfloat16())
    assert term.num_params == 5 * (12 + 9 - 5) < LowRank.from_factors(normal(12, 5), normal(5, 9)).num_params
    assert term.nbytes == 2 * term.num_params + 4 * 12


def test_its_factors_make_it_a_plain_low_rank_term() -> None:
    term = PivotedLowRank.from_factors(normal(12, 5), normal(5, 9, seed=1))
    factors = term.exact_factors()
    assert factors is not None
    torch.testing.assert_close(LowRank.from_factors(*factors).dense(), term.dense())


def test_bfloat16_keeps_the_matrix_about_as_well_as_two_factors_do() -> None:
    B, A = normal(200, 60), normal(60, 100, seed=1)
    exact = B.double() @ A.double()
    half = PivotedLowRank.from_factors(B.bfloat16(), A.bfloat16()).dense(torch.float64)
    stored = B.bfloat16().double() @ A.bfloat16().double()
    error, theirs = (half - stored).norm() / exact.norm(), (stored - exact).norm() / exact.norm()
    assert error < 8 * theirs
