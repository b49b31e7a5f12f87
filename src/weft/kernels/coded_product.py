"""The product of a few tokens with a coded matrix, without that matrix: what a model that answers does most.

    y[t, i] = sum_j x[t, j] number(code[i, j]) scale[i, j],   number(c) = c - zero, or levels[c]

Dense, the matrix is written and read in several passes of many times the bytes of its code. On a GPU where Triton is
installed (torch brings it) a kernel reads the code once; elsewhere, and for many tokens, the dense matrix is made.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.autocast import compute_dtype

__all__ = ["FEW", "Coded", "coded_product", "worthwhile"]

FEW = 16
"""Tokens up to which the kernel is used."""


class Coded(NamedTuple):
    """A matrix (out, in) as integer codes and what makes numbers of them."""

    codes: Tensor  # packed (`weft.kernels.bit_packing`), or int8 as they are
    scales: Tensor  # one for each group of inputs of a row, or of the flattened matrix
    bits: int
    group: int  # numbers a scale
    flat: bool = False  # groups run over the flattened matrix
    zero: int = 0  # of all groups
    zeros: Tensor | None = None  # packed, one a scale
    levels: Tensor | None = None  # (2^bits,) fp32, in place of code - zero


@functools.cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


def worthwhile(x: Tensor) -> bool:
    """Whether x (..., in) is few tokens on a GPU with Triton, and no gradient is asked for."""
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    few = x.is_cuda and 0 < x.numel() <= FEW * x.shape[-1]
    return few and not wants_gradient and compute_dtype(x) != torch.float64 and _triton_is_here()


def coded_product(x: Tensor, coded: Coded, out_features: int) -> Tensor:
    """x (..., in), at most `FEW` tokens, -> (..., out), in autocast's dtype if it is on, else in that of x."""
    kernel = importlib.import_module("weft.kernels.coded_product_triton").product
    y: Tensor = kernel(x.reshape(-1, x.shape[-1]).to(compute_dtype(x)), coded, out_features)
    return y.view(*x.shape[:-1], out_features)
