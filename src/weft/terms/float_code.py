"""FloatCode: floating-point numbers of 4 to 8 bits, with a scale for each group of inputs of a row.

    T[i, j] = value(code[i, j]) * scale[i, j // group]

A scale is a power of two in one byte (the shared exponent of the OCP MX formats: "e8m0"), or a float of 16 or 32 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from weft.errors import WeftError
from weft.kernels.bit_packing import looked_up, pack, packed_size, unpack
from weft.kernels.bits import numbers_of, product
from weft.kernels.coded_product import Coded
from weft.kernels.float_format import FORMATS, float_codes, float_table
from weft.kernels.integer_grid import grouped, ungrouped
from weft.terms.base import FloatCodes, Spec
from weft.terms.quantized import Quantized

__all__ = ["FloatCode"]

_SCALES = {"e8m0": 1, "float16": 2, "bfloat16": 2, "float32": 4}  # bytes
_BIAS = 127  # of e8m0


class FloatCode(Quantized):
    """T[i, j] = value(code) * scale of its group of inputs.

    Args:
        element: "e2m1", "e2m3", "e3m2", "e4m3" or "e5m2": bits of exponent and mantissa, beside a sign.
        group: inputs a scale; None for one scale a row. The last group is short where it does not divide the inputs.
        scale: "e8m0", "float16", "bfloat16" or "float32".

    Raises:
        WeftError: another element, group or scale.
    """

    kind = "float_code"
    codes: Tensor  # uint8, packed, row after row
    scales: Tensor  # uint8 (out, groups * bytes of a scale)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        element: str = "e2m1",
        group: int | None = 32,
        scale: str = "e8m0",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        if element not in FORMATS or scale not in _SCALES:
            raise WeftError(
                f"There are no codes of {element} with scales in {scale}; give {', '.join(FORMATS)}, with scales in "
                f"{', '.join(_SCALES)}."
            )
        if group is not None and group < 1:
            raise WeftError(f"A group of {group} inputs is none; give 1 or more, or None for whole rows.")
        self.element, self.group, self.scale_dtype = element, group, scale
        size = packed_size(out_features * in_features, FORMATS[element].bits)
        self.register_buffer("codes", torch.empty(size, device=device, dtype=torch.uint8))
        groups = -(-in_features // self.width)
        scales = torch.empty((out_features, groups * _SCALES[scale]), device=device, dtype=torch.uint8)
        self.register_buffer("scales", scales)

    @property
    def width(self) -> int:
        """Inputs a scale, whole rows resolved."""
        return self.group or self.in_features

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, element: str = "e2m1", group: int | None = 32, scale: str = "e8m0"
    ) -> FloatCode:
        """The nearest codes of `matrix` (out, in): 2^(floor(log2 max|w|) - top) is a shared exponent's scale (section
        6.3 of the OCP MX specification, v1.0), max|w| / largest any other's.

        Raises:
            WeftError: a number whose scale is beyond the dtype of scales.
        """
        term = cls(matrix.shape[1], matrix.shape[0], element=element, group=group, scale=scale, device=matrix.device,
                   dtype=matrix.dtype)  # fmt: skip
        groups, format = grouped(matrix.detach().float(), term.width), FORMATS[element]
        largest = groups.abs().amax(-1)
        if scale == "e8m0":
            exponent = torch.frexp(largest).exponent - 1 - format.top + _BIAS
            term.scales = exponent.masked_fill(largest == 0, 0).clamp(0, 2 * _BIAS).to(torch.uint8)
        else:
            stored = (largest / format.largest).to(getattr(torch, scale))
            if torch.isinf(stored).any():
                raise WeftError(f"The matrix cannot be coded: its scales are beyond {scale}; choose another dtype.")
            term.scales = stored.view(torch.uint8)
        scales = term.scale_matrix().unsqueeze(-1)
        codes = float_codes(groups / torch.where(scales > 0, scales, 1.0), element)
        term.codes = pack(ungrouped(codes, matrix.shape[1]).flatten(), format.bits)
        return term

    @classmethod
    def example(cls, generator: Generator) -> FloatCode:
        """One of 6 bits with a short last group."""
        return cls.from_matrix(torch.randn(12, 8, generator=generator), "e2m3", 3)

    def element_codes(self) -> Tensor:
        """The codes (out, in) uint8: sign, exponent and mantissa."""
        count = self.out_features * self.in_features
        return unpack(self.codes, FORMATS[self.element].bits, count).view(self.out_features, -1)

    def scale_matrix(self) -> Tensor:
        """The scales (out, groups), fp32."""
        if self.scale_dtype == "e8m0":
            ones = torch.ones(self.scales.shape, device=self.scales.device)
            return torch.ldexp(ones, self.scales.int() - _BIAS)
        return numbers_of(self.scales, getattr(torch, self.scale_dtype)).float()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        levels, count = float_table(self.element, device=self.codes.device), self.out_features * self.in_features
        values = looked_up(self.codes, FORMATS[self.element].bits, count, levels).view(self.out_features, -1)
        scales, wanted = self.scale_matrix().unsqueeze(-1), dtype or self.carrier.dtype
        return ungrouped(product(grouped(values, self.width), scales, wanted), self.in_features)

    def coded(self) -> Coded:
        format = FORMATS[self.element]
        values = float_table(self.element, device=self.codes.device)
        return Coded(self.codes, self.scale_matrix(), format.bits, self.width, levels=values)

    def exact_floats(self) -> FloatCodes:
        return FloatCodes(
            self.element_codes(), self.scale_matrix(), self.element, self.width, self.scale_dtype == "e8m0"
        )

    def spec(self) -> Spec:
        return super().spec() | {"element": self.element, "group": self.group, "scale": self.scale_dtype}
