"""Numbers out of their bits, as a view or, where a graph is exported to formats without such views, by arithmetic.

(-1)^sign 2^(exponent - bias) (1 + mantissa / 2^m),   subnormal numbers where the exponent is 0
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["numbers_of", "numbers_of_exported", "product", "signed"]

_MANTISSA = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def numbers_of(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The floating-point numbers (..., n) that integers (..., n k) hold the bits of, lowest byte first."""
    return numbers_of_exported(bits, dtype) if torch.compiler.is_exporting() else bits.view(dtype)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits (uint8) in a type that holds their differences too: below 8 bits signed bytes, by a view."""
    return codes.view(torch.int8) if bits < 8 and not torch.compiler.is_exporting() else codes.short()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a times b, which broadcasts over a, computed in the wider dtype of both and stored in `dtype`: on a GPU in one
    pass, without a wide copy.
    """
    if torch.compiler.is_compiling():
        return (a * b).to(dtype)
    return torch.mul(a, b, out=torch.empty(a.shape, dtype=dtype, device=a.device))


def numbers_of_exported(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain arithmetic: exact for all finite numbers of fp32, fp16 and bf16."""
    width, size = 8 * dtype.itemsize, 8 * bits.element_size()
    parts = bits.long().remainder(2**size).view(*bits.shape[:-1], -1, width // size)
    weights = torch.tensor([2 ** (size * i) for i in range(width // size)], device=bits.device)
    word, m = (parts * weights).sum(-1), _MANTISSA[dtype]
    mantissa, rest = word.remainder(2**m), word.div(2**m, rounding_mode="floor")
    exponents = 2 ** (width - 1 - m)
    exponent, sign = rest.remainder(exponents), rest.div(exponents, rounding_mode="floor")
    bias = exponents // 2 - 1
    powers = torch.tensor([2.0 ** (max(e, 1) - bias - m) for e in range(exponents - 1)], device=bits.device)
    whole = mantissa + (exponent > 0) * 2**m
    return ((1 - 2 * sign) * whole.float() * powers[exponent.clamp(max=exponents - 2)]).to(dtype)
