"""Complex weights as the numbers 1, i, -1 and -i times two scales, and the real matrices that they stand for.

    V = V_r + i V_i;   code 0, 1, 2, 3 for 1, i, -1, -i: on the real axis where |V_r| >= |V_i|, by the sign of that part
    s_r = mean |V_r| of those on the real axis,   s_i = mean |V_i| of the others; at least 1e-5
    y = sum w conj(x):   (y_r, y_i) = (x_r, x_i) [[W_r, W_i], [W_i, -W_r]]^T

The sign of zero counts as plus, and an axis that nobody is on has the least scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block", "block_gradients", "parts", "to_codes"]

_LEAST = 1e-5


def to_codes(V_r: Tensor, V_i: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (out / 2, in / 2) uint8, and s_r and s_i (2,) in the dtype of the parts."""
    real = V_r.abs() >= V_i.abs()
    codes = torch.where(real, torch.where(V_r < 0, 2, 0), torch.where(V_i < 0, 3, 1)).to(torch.uint8)
    sums = torch.stack([(V_r.abs() * real).sum(), (V_i.abs() * ~real).sum()])
    counts = torch.stack([real.sum(), (~real).sum()]).clamp(min=1)
    return codes, (sums / counts).clamp(min=_LEAST)


def parts(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """W_r and W_i (out / 2, in / 2) of codes, in the dtype of the scales (2,)."""
    sign = 1 - (codes & 2).to(scales.dtype)
    imaginary = (codes & 1).to(scales.dtype)
    return sign * (1 - imaginary) * scales[0], sign * imaginary * scales[1]


def block(W_r: Tensor, W_i: Tensor) -> Tensor:
    """The real matrix (out, in) of y = sum w conj(x), parts one after the other."""
    return torch.cat([torch.cat([W_r, W_i], 1), torch.cat([W_i, -W_r], 1)])


def block_gradients(G: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the two parts, of that of the real matrix (out, in)."""
    (a, b), (c, d) = ([*half.chunk(2, 1)] for half in G.chunk(2))
    return a - d, b + c
