"""The orthonormal discrete cosine transform: basis, fast transform (Makhoul 1980), chosen columns.

`C (k, k)` with `C[i, j] = sqrt(2/k) cos(pi i (2j+1) / (2k))`, row 0 times `sqrt(1/2)`; `C C^T = I`. Row i of `C` is the
i-th DCT-II vector, so `X C^T (..., k)` is the DCT-II of the last dimension of `X (..., k)` and `X C` its inverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.linalg.subspace import upcast

__all__ = ["dct", "dct_basis", "dct_columns", "makhoul"]


def dct_columns(index: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The DCT-II vectors of the frequencies `index (..., r)` as columns, `(..., k, r)`: `C^T[:, index]`.

    The angle is reduced in integers and looked up in a table of 4k cosines in fp64, so large k loses nothing.
    """
    turn = torch.arange(4 * k, dtype=torch.float64, device=index.device) * (math.pi / (2 * k))
    table = (torch.cos(turn) * math.sqrt(2 / k)).to(dtype)
    odd = 2 * torch.arange(k, device=index.device) + 1
    columns = table[(odd[:, None] * index.unsqueeze(-2)) % (4 * k)]
    halved = torch.tensor([1.0, math.sqrt(0.5)], dtype=dtype, device=index.device)[(index == 0).long()]
    return columns * halved.unsqueeze(-2)


def dct_basis(k: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """`C^T (k, k)`: all DCT-II vectors as columns, so that `X @ dct_basis(k)` is the transform of the rows of `X`."""
    return dct_columns(torch.arange(k, device=device), k, dtype)


def dct(X: Tensor) -> Tensor:
    """DCT-II of the last dimension by one product with the basis: `X C^T`, in fp32 or fp64."""
    X = upcast(X)
    return X @ dct_basis(X.shape[-1], X.dtype, X.device)


def makhoul(X: Tensor) -> Tensor:
    """The same transform by one FFT of the last dimension (even samples, then odd ones backwards): O(k log k) a row."""
    X = upcast(X)
    k = X.shape[-1]
    spectrum = torch.fft.fft(torch.cat([X[..., ::2], X[..., 1::2].flip(-1)], dim=-1))
    angle = torch.arange(k, dtype=X.dtype, device=X.device) * (-math.pi / (2 * k))
    weight = torch.polar(torch.full_like(angle, math.sqrt(2 / k)), angle)
    weight[0] = math.sqrt(1 / k)
    transformed: Tensor = (spectrum * weight).real
    return transformed
