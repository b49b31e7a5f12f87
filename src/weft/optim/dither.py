"""Stochastic rounding: what nearest rounding would lose of a small update of a large weight is kept on average.

bfloat16 has 8 significant bits and float16 has 11: rounded to nearest, an update below 2^-9 or 2^-12 of the weight
changes nothing.

Source: Gupta et al., 2015, arXiv 1502.02551; for the weight update in bfloat16, Zamirai et al., 2020, arXiv 2010.06192.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stochastic_round"]


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 `values` in `dtype`, each at one of its two neighbours, so that the mean is exact; wider dtypes are cast.

    Infinities and NaN stay what they are. The generator lives on the values' device.
    """
    if dtype == torch.bfloat16:
        return _bfloat16(values.contiguous(), generator)
    return _float16(values, generator) if dtype == torch.float16 else values.to(dtype)


def _bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Random bits are added below the cut, and the rest is dropped."""
    # four 16-bit numbers from each 64-bit word: on a CPU a tenth of the time of one draw a number
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=generator)
    noise = words.view(torch.int16)[: values.numel()].to(torch.int32).bitwise_and_(0xFFFF)
    bits = values.view(torch.int32).add(noise.view(values.shape)).bitwise_and_(-(1 << 16))
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)


def _float16(values: Tensor, generator: torch.Generator) -> Tensor:
    """P(the neighbour beyond the nearest) = distance to the nearest / distance between the two.

    fp16 has subnormals where fp32 has none, so bits cannot be cut as for bf16.
    """
    nearest = values.to(torch.float16)
    error = values - nearest.float()
    # the neighbour on the side of the error: one step in the bits, away from zero or towards it
    bits = nearest.view(torch.int16)
    from_zero = torch.where(error > 0, 1, -(2**15) + 1).to(torch.int16)
    outwards = (error > 0) == (nearest > 0)
    other = torch.where(nearest == 0, from_zero, torch.where(outwards, bits + 1, bits - 1)).view(torch.float16)
    gap = (other.float() - nearest.float()).abs()
    moves = torch.rand(values.shape, generator=generator, device=values.device) * gap < error.abs()
    return torch.where(moves & torch.isfinite(nearest) & (error != 0), other, nearest)
