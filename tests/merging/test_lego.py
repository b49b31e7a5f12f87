"""LoRA-LEGO: what clustering must keep, and k-means against another library's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from torch import Tensor

from weft.merging import Pair
from weft.merging.lego import kmeans, lego, lloyd, units

OUT, IN = 12, 9


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(rank: int, seed: int) -> Pair:
    generator = seeded(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(OUT, rank), draw(rank, IN)


def merged(pairs: list[Pair], rank: int, **options: bool) -> Tensor:
    B, A = lego(pairs, rank, seeded(0), **options)
    assert B.shape == (OUT, rank) and A.shape == (rank, IN)
    return B @ A


def total(pairs: list[Pair]) -> Tensor:
    return sum((B @ A for B, A in pairs), start=torch.zeros(()))


@pytest.mark.parametrize("canonical", [False, True])
def test_every_unit_its_own_cluster_is_the_sum(canonical: bool) -> None:
    pairs = [pair(2, 1), pair(3, 2)]
    torch.testing.assert_close(merged(pairs, 5, reweight=False, canonical=canonical), total(pairs))
    torch.testing.assert_close(merged(pairs, 5, canonical=canonical), total(pairs) * 0.5**0.5)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_identical_adapters_are_themselves(copies: int) -> None:
    B, A = pair(4, 1)
    for normalise in (True, False):
        torch.testing.assert_close(merged([(B, A)] * copies, 4, normalise=normalise), B @ A)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100))
def test_the_order_of_ranks_and_adapters_does_not_matter(seed: int) -> None:
    pairs = [pair(4, 1), pair(8, 2), pair(3, 3)]
    order = torch.randperm(8, generator=seeded(seed))
    B, A = pairs[1]
    moved = [pairs[2], (B[:, order], A[order]), pairs[0]]
    torch.testing.assert_close(merged(moved, 6), merged(pairs, 6), atol=1e-9, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(scales=st.lists(st.sampled_from([-30.0, -1.0, -0.02, 0.5, 7.0]), min_size=4, max_size=4))
def test_the_gauge_of_a_unit_does_not_matter(scales: list[float]) -> None:
    first, (B, A) = pair(4, 1), pair(4, 2)
    c = torch.tensor(scales, dtype=torch.float64)
    torch.testing.assert_close(merged([first, (B / c, c.unsqueeze(1) * A)], 5), merged([first, (B, A)], 5))


def test_canonical_units_do_not_depend_on_the_basis() -> None:
    first, (B, A) = pair(4, 1), pair(4, 2)
    mix = torch.randn(4, 4, generator=seeded(3), dtype=torch.float64)
    other = (B @ torch.linalg.inv(mix), mix @ A)
    same = merged([first, (B, A)], 5, canonical=True)
    torch.testing.assert_close(merged([first, other], 5, canonical=True), same, atol=1e-8, rtol=1e-8)
    assert (merged([first, other], 5) - merged([first, (B, A)], 5)).norm() > 1e-3


def test_opposite_signs_of_one_update_do_not_cancel() -> None:
    B, A = pair(1, 1)
    torch.testing.assert_close(merged([(B, A), (-B, -A)], 1), B @ A)


def test_norms_of_averages_are_restored() -> None:
    """The mean of n random unit vectors has norm about n^(-1/2)."""
    B, A = pair(8, 1)
    B, A = B / B.norm(dim=0), A / A.norm(dim=1, keepdim=True)
    a, _ = units([(B, A)])
    assert a.mean(0).norm() < 0.6
    B, A = lego([(B, A)], 1, seeded(0), reweight=False)
    torch.testing.assert_close(A.norm() * B.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_units_are_balanced_signed_and_sorted() -> None:
    B, A = pair(5, 1)
    B[:, 2] = 0  # an untrained rank: its a is noise
    a, b = units([(B, A)])
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1))
    torch.testing.assert_close(b.mT @ a, B @ A)
    assert (a[a.abs().amax(1) > 0].gather(1, a[a.abs().amax(1) > 0].abs().argmax(1, keepdim=True)) > 0).all()
    assert int((a.abs().amax(1) == 0).sum()) == 1
    rows = torch.cat([a, b], 1).tolist()
    assert rows == sorted(rows)


def test_zero_adapters_merge_to_zero() -> None:
    B, A = pair(3, 1)
    assert torch.equal(merged([(0 * B, A), (0 * B, A)], 3), torch.zeros(OUT, IN, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_lloyd_agrees_with_scipy(seed: int) -> None:
    points = torch.randn(40, 6, generator=seeded(seed), dtype=torch.float64)
    start = points[torch.randperm(40, generator=seeded(seed))[:5]]
    centres, labels = kmeans2(points.numpy(), start.numpy(), iter=100, minit="matrix", missing="raise")
    ours = lloyd(points, start)
    assert np.array_equal(ours.numpy(), labels)
    means = torch.stack([points[ours == k].mean(0) for k in range(5)])
    torch.testing.assert_close(means, torch.from_numpy(centres))


def test_an_empty_cluster_takes_the_farthest_point() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [50.0]], dtype=torch.float64)
    labels = lloyd(points, torch.tensor([[1.0], [1e6]], dtype=torch.float64))
    assert labels.tolist() == [0, 0, 0, 1]


def test_kmeans_finds_clusters_and_repeats() -> None:
    centres = 20 * torch.eye(4, dtype=torch.float64)
    points = torch.cat([c + 0.1 * torch.randn(6, 4, generator=seeded(i)) for i, c in enumerate(centres)])
    labels = kmeans(points, 4, seeded(1))
    assert all(len(set(labels[6 * i : 6 * i + 6].tolist())) == 1 for i in range(4)) and len(set(labels.tolist())) == 4
    assert torch.equal(labels, kmeans(points, 4, seeded(1)))
    assert len(set(kmeans(torch.ones(5, 2), 3, seeded(0)).tolist())) == 1, "fewer distinct points than clusters"
