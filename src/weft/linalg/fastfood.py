"""Fastfood: a fixed random map P from R^d to R^D in O(L log L) time that stores nothing (Le, Sarlos and Smola, 2013).

    P = crop_D  H G Pi H S pad_L / sqrt(D sum g^2),   L = the power of two at or above max(D, d)

S random signs, H the Walsh-Hadamard matrix (unnormalised, H H = L), Pi a permutation, G = diag(g) Gaussian. All are
functions of a seed (`weft.linalg.counter`). E ||P theta|| = ||theta||.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.linalg.counter import normal, permutation, signs, subseed
from weft.tables import table

__all__ = ["fastfood", "fastfood_transposed", "fwht"]

_RADIX = 16


@table
def _hadamard() -> list[list[float]]:
    """H of size 16; its leading blocks are the smaller ones."""
    return [[1.0 - 2.0 * ((i & j).bit_count() % 2) for j in range(_RADIX)] for i in range(_RADIX)]


def fwht(x: Tensor) -> Tensor:
    """H x (n,) for x (n,), n a power of two; H unnormalised, in the order of `scipy.linalg.hadamard`.

    H_n is the Kronecker product of H_16 with itself, log16 n times: a few matrix products instead of log2 n sweeps.
    """
    size, done = x.numel(), 1
    while done < size:
        radix = min(_RADIX, size // done)
        H = _hadamard(device=x.device, dtype=x.dtype)[:radix, :radix]
        x = x.view(-1, radix) @ H if done == 1 else H @ x.view(-1, radix, done)
        done *= radix
    return x.view(-1)


def fastfood(theta: Tensor, seed: int, size: int) -> Tensor:
    """P theta (size,) for theta (d,), in its dtype."""
    flips, order, g = _pieces(theta, seed, size, len(theta))
    v = torch.nn.functional.pad(theta, (0, len(g) - len(theta))) * flips
    return fwht(fwht(v)[order] * g)[:size].clone()  # not a view that keeps all L numbers


def fastfood_transposed(y: Tensor, seed: int, width: int) -> Tensor:
    """P^T y (d,) for y (size,) and d = width, in its dtype."""
    flips, order, g = _pieces(y, seed, len(y), width)
    v = fwht(torch.nn.functional.pad(y, (0, len(g) - len(y)))) * g
    return (fwht(torch.empty_like(v).index_copy_(0, order, v)) * flips)[:width].clone()


def _pieces(like: Tensor, seed: int, size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """S (L,), Pi (L,) and G / sqrt(D sum g^2) (L,)."""
    bits = (max(size, width) - 1).bit_length()
    length, device = 1 << bits, like.device
    g = normal(subseed(seed, 2), length, device).to(torch.promote_types(like.dtype, torch.float32))
    g /= torch.linalg.vector_norm(g, dtype=torch.float64) * size**0.5
    flips = signs(subseed(seed, 0), length, device)
    return flips.to(like.dtype), permutation(subseed(seed, 1), bits, device), g.to(like.dtype)
