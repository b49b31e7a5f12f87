"""Rounding fp32 to bfloat16: a small update of a large weight is lost by nearest rounding, kept on average by
stochastic.

bfloat16 has 8 significant bits: with nearest rounding any update below 2^-9 of the weight changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stochastic_bfloat16"]


def stochastic_bfloat16(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` (fp32, on the generator's device) rounded to one of its two bfloat16 neighbours, with `E[result] = x`.

    Random bits are added below the cut and the rest is dropped. Infinities and NaN are passed through.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = (x.contiguous().view(torch.int32) + noise) & -(1 << 16)
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))
