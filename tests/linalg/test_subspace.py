from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.linalg.subspace import (
    canonical_signs,
    captured_energy,
    cholesky_qr,
    principal_angles,
    randomized_svd,
    range_finder,
    rayleigh_ritz,
    subspace_iteration,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(*shape: int, rate: float = 0.7, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values rate^i."""
    G = torch.randn(*shape, dtype=torch.float64, generator=rng(seed))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ torch.diag(rate ** torch.arange(S.shape[-1], dtype=torch.float64)) @ Vh


def orthonormal_error(Q: torch.Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 8), st.integers(0, 10**6), st.booleans())
def test_cholesky_qr_is_orthonormal_whatever_the_rank(s: int, r: int, rank: int, seed: int, double: bool) -> None:
    r = min(r, s)
    dtype = torch.float64 if double else torch.float32
    Y = torch.randn(2, s, rank, generator=rng(seed)) @ torch.randn(2, rank, r, generator=rng(seed + 1))
    Q = cholesky_qr(Y.to(dtype))
    assert orthonormal_error(Q) < (1e-12 if double else 2e-5)
    if rank >= r:  # full column rank: the span is kept
        assert (Y.to(dtype) - Q @ (Q.mT @ Y.to(dtype))).norm() <= 1e-4 * (1 + Y.norm())


def test_cholesky_qr_matches_householder_and_survives_bad_scaling() -> None:
    Y = torch.randn(3, 40, 6, dtype=torch.float64, generator=rng())
    R = torch.linalg.qr(Y).R
    expected = torch.linalg.qr(Y).Q * torch.sign(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
    scaled = Y * torch.logspace(-12, 12, 6, dtype=torch.float64)
    assert torch.allclose(cholesky_qr(scaled), expected, atol=1e-11)
    assert orthonormal_error(cholesky_qr(torch.zeros(2, 5, 3))) == 0


def test_half_precision_is_computed_in_single() -> None:
    Y = torch.randn(16, 4, generator=rng()).bfloat16()
    assert cholesky_qr(Y).dtype == torch.float32
    assert subspace_iteration(Y.mT, torch.eye(16, 2).bfloat16()).dtype == torch.float32


def test_canonical_signs() -> None:
    Q = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64, generator=rng())).Q
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    assert torch.equal(canonical_signs(Q), canonical_signs(Q * flips))
    top = canonical_signs(Q).gather(0, Q.abs().argmax(0, keepdim=True))
    assert bool((top > 0).all())
    assert torch.equal(canonical_signs(Q * flips, previous=Q), Q)


def test_subspace_iteration_converges_to_the_top_right_space() -> None:
    G = decaying(30, 20)
    V = torch.linalg.svd(G).Vh[:4].mT
    start = cholesky_qr(torch.randn(20, 4, dtype=torch.float64, generator=rng(1)))
    angles = [float(principal_angles(V, subspace_iteration(G, start, k)).max()) for k in (1, 10, 40)]
    assert angles[0] > angles[1] > angles[2] and angles[2] < 1e-8
    assert (
        torch.allclose(subspace_iteration(G, V), V, atol=1e-10)
        or principal_angles(V, subspace_iteration(G, V)).max() < 1e-8
    )


def test_a_warm_start_beats_a_cold_one_and_keeps_columns() -> None:
    G = decaying(40, 24, rate=0.8)
    nearby = G + 1e-3 * torch.randn(40, 24, dtype=torch.float64, generator=rng(3))
    Q = torch.linalg.svd(G).Vh[:5].mT
    moved = canonical_signs(subspace_iteration(nearby, Q), previous=Q)
    assert (moved * Q).sum(0).min() > 0.99
    cold = subspace_iteration(nearby, cholesky_qr(torch.randn(24, 5, dtype=torch.float64, generator=rng(4))))
    assert captured_energy(nearby, moved) > captured_energy(nearby, cold)


def test_sums_over_row_shards_give_the_whole_answer() -> None:
    G = decaying(30, 12)
    start = cholesky_qr(torch.randn(12, 3, dtype=torch.float64, generator=rng(1)))
    parts = torch.stack([torch.cat([G[:13], G[:0].new_zeros(4, 12)]), G[13:]])
    summed = subspace_iteration(parts, start.expand(2, -1, -1), 2, lambda x: x.sum(0, keepdim=True).expand_as(x))
    assert torch.allclose(summed[0], subspace_iteration(G, start, 2), atol=1e-12)


def test_rayleigh_ritz_recovers_singular_values() -> None:
    G = decaying(15, 10)
    Q, values = rayleigh_ritz(G, torch.eye(10, dtype=torch.float64), 4)
    _, S, Vh = torch.linalg.svd(G)
    assert torch.allclose(values, S[:4], atol=1e-10)
    assert principal_angles(Vh[:4].mT, Q).max() < 1e-6


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (2, 3, 12, 9)])
def test_randomized_svd_is_exact_on_low_rank(shape: tuple[int, ...]) -> None:
    A = torch.randn(*shape[:-1], 4, dtype=torch.float64, generator=rng()) @ torch.randn(
        *shape[:-2], 4, shape[-1], dtype=torch.float64, generator=rng(1)
    )
    U, S, Vh = randomized_svd(A, 4, generator=rng(2))
    assert torch.allclose(U * S.unsqueeze(-2) @ Vh, A, atol=1e-10)
    assert torch.allclose(S, torch.linalg.svdvals(A)[..., :4], atol=1e-10)
    assert torch.equal(canonical_signs(U), U)
    again = randomized_svd(A, 4, generator=rng(2))
    assert torch.equal(again[0], U)


def test_randomized_svd_is_near_optimal_with_a_tail() -> None:
    A = decaying(40, 30, rate=0.9)
    U, S, Vh = randomized_svd(A, 6, generator=rng())
    best = torch.linalg.svdvals(A)[6:].square().sum().sqrt()
    assert (A - U * S @ Vh).norm() <= 1.02 * best
    assert captured_energy(A.mT, range_finder(A, 6, generator=rng())) > 0.95 * (S.square().sum() / A.square().sum())


def test_principal_angles_at_both_ends() -> None:
    a = torch.tensor([1e-9, 0.3, 1.2], dtype=torch.float64)
    P = torch.eye(6, 3, dtype=torch.float64)
    Q = torch.cat([torch.diag(torch.cos(a)), torch.diag(torch.sin(a))])
    assert torch.allclose(principal_angles(P, Q), a, rtol=1e-9, atol=1e-15)


def test_captured_energy_of_nothing_is_one() -> None:
    assert captured_energy(torch.zeros(3, 4), torch.eye(4, 1)) == 1
    G = torch.diag(torch.tensor([3.0, 4.0]))
    assert captured_energy(G, torch.eye(2, 1)) == pytest.approx(9 / 25)
