"""Floating-point numbers of few bits, as codes: a sign, e bits of exponent, m of mantissa, in IEEE's order of bits.

    value = (-1)^sign * 2^(exponent - bias) * (1 + mantissa / 2^m),   bias = 2^(e-1) - 1;   exponent 0: subnormal

The formats of the OCP specifications (Micikevicius et al., 2022, arXiv 2209.05433; Rouhani et al., 2023, arXiv
2310.10537): e4m3 has one NaN and no infinity, e5m2 both, the smaller ones neither. Rounding is to the nearest, ties to
the even mantissa; what is beyond the largest number becomes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weft.tables import table

__all__ = ["FORMATS", "FloatFormat", "float_codes", "float_table", "float_values"]


class FloatFormat(NamedTuple):
    """One format."""

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        """Of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """Of the exponent."""
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def top(self) -> int:
        """The exponent of the largest number: floor(log2 of it)."""
        return int(torch.tensor(self.largest).log2().floor())


FORMATS = {
    "e2m1": FloatFormat(2, 1, 6.0),
    "e2m3": FloatFormat(2, 3, 7.5),
    "e3m2": FloatFormat(3, 2, 28.0),
    "e4m3": FloatFormat(4, 3, 448.0),
    "e5m2": FloatFormat(5, 2, 57344.0),
}


@table
def _sizes(name: str) -> tuple[float, ...]:
    """The numbers that are not negative, by their codes: rising."""
    return _SIZES[name]


@table
def float_table(name: str) -> tuple[float, ...]:
    """All numbers, by their codes."""
    return *_SIZES[name], *(-size for size in _SIZES[name])


def _sizes_of(name: str) -> tuple[float, ...]:
    e, m, largest = FORMATS[name]
    values = []
    for code in range(2 ** (e + m)):
        exponent, mantissa = code >> m, code % 2**m / 2**m
        power = max(exponent, 1) - FORMATS[name].bias
        values.append(min(2.0**power * (mantissa + (exponent > 0)), largest))  # codes beyond the largest are not used
    return tuple(values)


_SIZES = {name: _sizes_of(name) for name in FORMATS}


def float_codes(numbers: Tensor, name: str, generator: torch.Generator | None = None) -> Tensor:
    """The nearest codes of fp32 numbers, uint8, of the same shape; with a generator on their device, of the two beside
    a number one that is drawn, so that its mean is the number.
    """
    format = FORMATS[name]
    size = numbers.abs().clamp(max=format.largest)
    # the step between neighbours, by the exponent that frexp gives exactly: size = f 2^n with f in [0.5, 1)
    power = (torch.frexp(size).exponent - 1).clamp(min=1 - format.bias) - format.mantissa
    step = torch.ldexp(torch.ones_like(size), power)
    steps = size / step
    if generator is None:
        steps = steps.round()
    else:
        steps = (steps + torch.rand(size.shape, generator=generator, device=size.device)).floor()
    found = (steps * step).clamp(max=format.largest)
    codes = torch.searchsorted(_sizes(name, device=numbers.device), found.contiguous(), out_int32=True)
    return (codes + (torch.signbit(numbers) * 2 ** (format.bits - 1)).int()).to(torch.uint8)


def float_values(codes: Tensor, name: str) -> Tensor:
    """The fp32 numbers of codes."""
    return float_table(name, device=codes.device)[codes.int()]
