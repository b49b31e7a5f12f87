"""Square roots of second moments against numpy, regular and singular."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.linalg.whiten import moment_root


def moment(size: int, tokens: int, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.mT @ x / tokens


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
@pytest.mark.parametrize("tokens", [3, 8, 100])
def test_root_squares_to_the_moment(tokens: int, scale: float) -> None:
    C = moment(8, tokens)
    root = moment_root(C * scale)
    assert root.triangular == (tokens >= 8)
    torch.testing.assert_close(root.factor @ root.factor.mT / scale, C, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [3, 100])
def test_solves_are_pseudo_inverses(tokens: int) -> None:
    root, R = moment_root(moment(8, tokens)), moment(8, 50, seed=1)[:, :3]
    inverse = np.linalg.pinv(root.factor.numpy(), rcond=1e-7)
    np.testing.assert_allclose(root.solve(R).numpy(), inverse @ R.numpy(), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(root.solve_transposed(R).numpy(), inverse.T @ R.numpy(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_ridge_is_relative_to_the_mean_of_the_diagonal(scale: float) -> None:
    C = moment(6, 3) * scale
    root = moment_root(C, ridge=0.1)
    expected = C + 0.1 * C.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    assert root.triangular
    torch.testing.assert_close(root.factor @ root.factor.mT / scale, expected / scale)


def test_a_cholesky_that_succeeds_on_noise_is_not_trusted() -> None:
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    C = x.mT @ x
    C = C + 1e-15 * C.diagonal().max() * torch.eye(40, dtype=torch.float64)
    assert not torch.linalg.cholesky_ex(C).info
    root = moment_root(C)
    assert not root.triangular
    # the solution stays as small as the data's own
    assert root.solve(C).norm() < 10 * C.norm().sqrt() * 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_strides(dtype: torch.dtype) -> None:
    C = moment(16, 200)[::2, ::2].to(dtype)
    root = moment_root(C)
    assert root.factor.dtype == torch.float64
    torch.testing.assert_close(root.factor @ root.factor.mT, C.double())


def test_empty_and_zero_moments() -> None:
    assert moment_root(torch.empty(0, 0)).solve(torch.empty(0, 2)).shape == (0, 2)
    root = moment_root(torch.zeros(3, 3), ridge=1e-4)
    ones = torch.ones(3, 1, dtype=torch.float64)
    assert not root.factor.any() and not root.solve(ones).any() and not root.solve_transposed(ones).any()


@pytest.mark.parametrize("bad", [torch.ones(2, 3), torch.ones(4)])
def test_only_square_moments(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="square"):
        moment_root(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value: float) -> None:
    C = torch.eye(3)
    C[1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        moment_root(C)
