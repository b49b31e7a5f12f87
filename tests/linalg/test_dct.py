from __future__ import annotations

import pytest
import scipy.fft
import torch

from weft.linalg.dct import dct, dct_basis, dct_columns, makhoul


@pytest.mark.parametrize("k", [1, 2, 7, 16, 33])
def test_basis_and_transforms_agree_with_scipy(k: int) -> None:
    X = torch.randn(5, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    C = dct_basis(k, torch.float64)
    assert torch.allclose(C @ C.mT, torch.eye(k, dtype=torch.float64), atol=1e-13)
    expected = torch.from_numpy(scipy.fft.dct(X.numpy(), norm="ortho"))
    assert torch.allclose(dct(X), expected, atol=1e-12)
    assert torch.allclose(makhoul(X), expected, atol=1e-12)
    assert torch.allclose(dct(X) @ C.mT, X, atol=1e-12)


def test_chosen_columns_are_columns_of_the_basis() -> None:
    index = torch.tensor([[0, 3, 5], [1, 2, 6]])
    columns = dct_columns(index, 7, torch.float64)
    assert columns.shape == (2, 7, 3)
    for b in range(2):
        assert torch.equal(columns[b], dct_basis(7, torch.float64)[:, index[b]])


def test_large_sizes_stay_orthonormal_in_single_precision() -> None:
    C = dct_basis(1500)
    assert (C.mT @ C - torch.eye(1500)).abs().max() < 2e-5
