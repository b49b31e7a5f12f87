"""Fastfood: a fixed random map P from R^d to R^D in O(L log L) time that stores nothing (Le, Sarlos and Smola, 2013).

    P = crop_D  H G Pi H S pad_L / sqrt(D sum g^2),   L = the power of two at or above max(D, d)

S random signs, H the Walsh-Hadamard matrix (unnormalised, H H = L), Pi a permutation, G = diag(g) Gaussian. All are
functions of a seed (`weft.linalg.counter`), computed again in backward. E ||P theta|| = ||theta||.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.linalg.counter import normal, permutation, signs, subseed

__all__ = ["fastfood", "fwht_"]


def fwht_(x: Tensor) -> Tensor:
    """H x in place for x (n,), n a power of two; H unnormalised, in the order of `scipy.linalg.hadamard`."""
    half = 1
    while half < x.numel():
        first, second = x.view(-1, 2, half).unbind(1)
        first.add_(second)
        second.mul_(-2).add_(first)  # (a + b) - 2 b
        half *= 2
    return x


def fastfood(theta: Tensor, seed: int, size: int) -> Tensor:
    """P theta (size,) for theta (d,), in its dtype; differentiable."""
    projected: Tensor = _Fastfood.apply(theta, seed, size)  # type: ignore[no-untyped-call]
    return projected


class _Fastfood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, seed: int, size: int) -> Tensor:
        ctx.seed, ctx.width = seed, theta.numel()
        flips, order, g = _pieces(theta, seed, size, ctx.width)
        v = torch.nn.functional.pad(theta, (0, len(g) - ctx.width)) * flips
        v = fwht_(v)[order] * g
        return fwht_(v)[:size].clone()  # not a view that keeps all L numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flips, order, g = _pieces(grad, ctx.seed, grad.numel(), ctx.width)
        v = fwht_(torch.nn.functional.pad(grad, (0, len(g) - grad.numel()))) * g
        v = fwht_(torch.empty_like(v).index_copy(0, order, v)) * flips
        return v[: ctx.width].clone(), None, None


def _pieces(like: Tensor, seed: int, size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """S (L,), Pi (L,) and G / sqrt(D sum g^2) (L,)."""
    bits = (max(size, width) - 1).bit_length()
    length, device = 1 << bits, like.device
    g = normal(subseed(seed, 2), length, device).to(torch.promote_types(like.dtype, torch.float32))
    g = g / (g.double().square().sum() * size).sqrt().to(g.dtype)
    flips = signs(subseed(seed, 0), length, device)
    return flips.to(like.dtype), permutation(subseed(seed, 1), bits, device), g.to(like.dtype)
