"""The three forms of a sum of low-rank deltas, against the sum itself."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.merging import MERGERS, Pair
from weft.merging.sums import cat, linear, svd


def pair(out: int, inn: int, rank: int, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(out, rank), draw(rank, inn)


def total(pairs: list[Pair]) -> Tensor:
    return sum((B @ A for B, A in pairs), start=torch.zeros(()))


PAIRS = [pair(12, 9, 2, 1), pair(12, 9, 3, 2)]
ANY = torch.Generator()


def test_cat_and_linear_are_the_sum() -> None:
    for merge in (cat, linear):
        B, A = merge(PAIRS, 1, ANY)
        torch.testing.assert_close(B @ A, total(PAIRS))
        assert A.shape == (5, 9)
    B, A = cat(PAIRS, 1, ANY)
    assert torch.equal(B[:, :2], PAIRS[0][0]) and torch.equal(A[2:], PAIRS[1][1])


def test_linear_takes_the_smallest_rank() -> None:
    B, A = PAIRS[0]
    twice = linear([(B, A), (2 * B, A)], 1, ANY)
    assert twice[1].shape == (2, 9)
    torch.testing.assert_close(twice[0] @ twice[1], 3 * B @ A)
    nothing = linear([(B, A), (-B, A)], 1, ANY)
    assert (nothing[0] @ nothing[1]).abs().max() < 1e-12
    assert linear([(0 * B, A)], 1, ANY)[1].shape == (1, 9)
    assert linear([pair(4, 3, 3, i) for i in range(4)], 1, ANY)[1].shape == (3, 3)


def test_linear_is_no_sum_of_factors() -> None:
    """The cross terms of adding factors belong to no adapter."""
    (B1, A1), (B2, A2) = pair(12, 9, 2, 1), pair(12, 9, 2, 2)
    B, A = linear([(B1, A1), (B2, A2)], 1, ANY)
    factors = (B1 + B2) @ (A1 + A2)
    assert (factors - B @ A).norm() > 0.5 * (B @ A).norm()


def test_svd_is_the_best_of_its_rank() -> None:
    dense = total(PAIRS)
    s = torch.linalg.svdvals(dense)
    for rank in range(1, 6):
        B, A = svd(PAIRS, rank, ANY)
        assert A.shape == (rank, 9)
        torch.testing.assert_close((dense - B @ A).norm(), s[rank:].norm(), atol=1e-10, rtol=1e-8)
    B, A = svd([pair(4, 3, 3, i) for i in range(4)], 12, ANY)
    assert A.shape == (3, 3), "no more components than the matrix has"


def test_the_table_is_closed() -> None:
    assert list(MERGERS) == ["linear", "cat", "svd", "lego", "rws", "cmlora"]
    assert all((m.merge is None) == (m.kind == "mix") == (m.weights is not None) for m in MERGERS.values())
