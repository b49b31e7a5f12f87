"""Exact decompositions against numpy and scipy in fp64, at every scale and shape that a weight can have."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.linalg.svd import low_rank_factors, pseudo_inverse_apply, singular_values, truncated_svd, widen


def matrix(rows: int, columns: int, rank: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    return matrix(rows, rank, seed=seed) @ matrix(rank, columns, seed=seed + 1)


SHAPES = [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1), (1, 1)]
SCALES = [1.0, 1e150, 1e-150]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_values_are_those_of_numpy(shape: tuple[int, int], scale: float) -> None:
    W = matrix(*shape)
    expected = np.linalg.svd(W.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(W * scale).numpy() / scale, expected, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_truncation_is_the_nearest_of_its_rank(shape: tuple[int, int], scale: float) -> None:
    W = matrix(*shape)
    rank = max(min(shape) // 2, 1)
    U, s, V = truncated_svd(W * scale, rank)
    u, sigma, v = scipy.linalg.svd(W.numpy(), full_matrices=False)
    nearest = (u[:, :rank] * sigma[:rank]) @ v[:rank]
    np.testing.assert_allclose(((U * (s / scale)) @ V).numpy(), nearest, atol=1e-12)
    torch.testing.assert_close(U.mT @ U, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(V @ V.mT, torch.eye(rank, dtype=torch.float64))


def test_all_triplets_rebuild_a_rank_deficient_matrix() -> None:
    W = matrix(8, 11, rank=3)
    U, s, V = truncated_svd(W)
    assert s.shape == (8,) and s[3:].max() < 1e-13 * s[0]
    torch.testing.assert_close((U * s) @ V, W)


def test_a_rank_beyond_the_matrix_gives_all_of_it() -> None:
    assert truncated_svd(matrix(4, 6), 100)[1].shape == (4,)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    W = torch.empty(shape)
    U, s, V = truncated_svd(W, 2)
    assert (U.shape, s.shape, V.shape) == ((shape[0], 0), (0,), (0, shape[1]))
    assert singular_values(W).shape == (0,)
    assert pseudo_inverse_apply(W, torch.ones(shape[0], 3)).shape == (shape[1], 3)


def test_zero_matrix() -> None:
    B, A = low_rank_factors(torch.zeros(4, 5), 2)
    assert not (B @ A).any()
    assert not pseudo_inverse_apply(torch.zeros(4, 5), torch.ones(4, 1)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    W = matrix(6, 9).to(dtype)
    assert widen(W).dtype == torch.float32 and widen(W.double()).dtype == torch.float64
    U, s, V = truncated_svd(W)
    assert s.dtype == torch.float32
    torch.testing.assert_close((U * s) @ V, W.float(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(singular_values(W), np.linalg.svd(W.double().numpy(), compute_uv=False), rtol=1e-12)


def test_half_precision_near_its_limit_does_not_overflow() -> None:
    W = torch.full((4, 4), 60000.0, dtype=torch.float16)
    assert torch.isfinite(truncated_svd(W)[1]).all()


def test_strided_input() -> None:
    W = matrix(16, 10)[::2, ::2]
    torch.testing.assert_close(singular_values(W.mT), torch.linalg.svdvals(W.contiguous()))


def test_batches_of_matrices() -> None:
    W = torch.stack([matrix(4, 6, seed=i) for i in range(3)])
    U, s, V = truncated_svd(W, 2)
    for i in range(3):
        one = truncated_svd(W[i], 2)
        torch.testing.assert_close((U[i] * s[i]) @ V[i], (one[0] * one[1]) @ one[2])


def test_factors_share_the_size_evenly() -> None:
    W = matrix(6, 9)
    B, A = low_rank_factors(W, 3)
    s = torch.linalg.svdvals(W)[:3]
    torch.testing.assert_close(B.mT @ B, torch.diag(s))
    torch.testing.assert_close(A @ A.mT, torch.diag(s))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("scale", SCALES)
def test_pseudo_inverse_is_numpys(rank: int | None, scale: float) -> None:
    M, R = matrix(9, 6, rank), matrix(9, 2, seed=5)
    expected = np.linalg.pinv(M.numpy(), rcond=1e-12) @ R.numpy()
    found = pseudo_inverse_apply(M * scale, R, tolerance=1e-12) * scale
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_pseudo_inverse_drops_what_lies_below_the_tolerance() -> None:
    M = torch.diag(torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
    found = pseudo_inverse_apply(M, torch.ones(3, 1, dtype=torch.float64), tolerance=1e-6)
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 1e3, 0.0], dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(-140, 140))
def test_scaling_a_matrix_scales_its_values(rows: int, columns: int, seed: int, exponent: float) -> None:
    W, scale = matrix(rows, columns, seed=seed), 10.0**exponent
    torch.testing.assert_close(singular_values(W * scale) / scale, singular_values(W), rtol=1e-10, atol=1e-12)
