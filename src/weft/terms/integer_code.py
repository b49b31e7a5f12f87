"""IntegerCode: integers of 2 to 8 bits, one scale and perhaps one zero point for each group of inputs of a row.

    T[i, j] = (code[i, j] - zero[i, j // group]) * scale[i, j // group]

Stored are b bits a weight, 16 a group for its scale, and b for its zero point where the grid is asymmetric; a symmetric
one has its zero at 2^(b-1). Bits a weight: b + (16 + b) / group, or b + 16 / group. It is the format of GPTQ and AWQ
(Frantar et al., 2022, arXiv 2210.17323), whose files hold scales in 16 bits; the last group of a row may be short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from weft.errors import WeftError
from weft.kernels.bit_packing import pack, packed_size, unpack
from weft.kernels.bits import numbers_of, product, signed
from weft.kernels.coded_product import Coded
from weft.kernels.integer_grid import checked, fit, grouped, to_codes, ungrouped
from weft.terms.base import IntegerCodes, Spec
from weft.terms.quantized import Quantized

__all__ = ["IntegerCode"]

_SCALES = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes


class IntegerCode(Quantized):
    """T[i, j] = (code - zero) * scale of its group of inputs.

    Args:
        bits: of a code, 2 to 8.
        group: inputs a scale; None for one scale a row. The last group is short where it does not divide the inputs.
        symmetric: no zero points: every one is 2^(bits - 1).
        scale_dtype: that scales are stored in: "float16", "bfloat16" or "float32".

    Raises:
        WeftError: another width, group or dtype.
    """

    kind = "integer_code"
    codes: Tensor  # uint8, packed, row after row
    scales: Tensor  # uint8 (out, groups * bytes of a scale): a cast of the model must not round them
    zeros: Tensor | None  # uint8, packed

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group: int | None = None,
        symmetric: bool = False,
        scale_dtype: str = "float16",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        if bits not in range(2, 9):
            raise WeftError(f"There are no integer codes of {bits} bits; give 2 to 8.")
        if group is not None and group < 1:
            raise WeftError(f"A group of {group} inputs is none; give 1 or more, or None for whole rows.")
        if scale_dtype not in _SCALES:
            raise WeftError(f"Scales are stored in {', '.join(_SCALES)}, not in {scale_dtype}.")
        self.bits, self.group, self.symmetric, self.scale_dtype = bits, group, symmetric, scale_dtype
        sizes: dict[str, tuple[int, ...]] = {
            "codes": (packed_size(out_features * in_features, bits),),
            "scales": (out_features, self.groups * _SCALES[scale_dtype]),
            "zeros": (packed_size(out_features * self.groups, bits),),
        }
        for name, size in sizes.items():
            absent = symmetric and name == "zeros"
            self.register_buffer(name, None if absent else torch.empty(size, device=device, dtype=torch.uint8))

    @property
    def width(self) -> int:
        """Inputs a scale, whole rows resolved."""
        return self.group or self.in_features

    @property
    def groups(self) -> int:
        """Scales a row."""
        return -(-self.in_features // self.width)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> IntegerCode:
        """Of known codes (out, in), scales (out, groups) in the dtype to be stored and zero points (out, groups), or
        None for a symmetric grid; `dtype` is the one that `dense` gives.
        """
        names = {"symmetric": zero is None, "scale_dtype": str(scale.dtype).removeprefix("torch.")}
        term = cls(codes.shape[1], codes.shape[0], bits=bits, group=group, device=codes.device, dtype=dtype, **names)  # type: ignore[arg-type]
        term.codes = pack(codes.to(torch.uint8).flatten(), bits)
        term.scales = scale.detach().contiguous().view(torch.uint8)
        term.zeros = None if zero is None else pack(zero.to(torch.uint8).flatten(), bits)
        return term

    @classmethod
    def from_matrix(
        cls,
        matrix: Tensor,
        bits: int = 4,
        group: int | None = None,
        *,
        symmetric: bool = False,
        clip: bool = False,
        scale_dtype: torch.dtype = torch.float16,
    ) -> IntegerCode:
        """The nearest codes of `matrix` (out, in), on the grid of `weft.kernels.integer_grid`.

        Raises:
            WeftError: a number whose scale is beyond `scale_dtype`.
        """
        groups = grouped(matrix.detach().float(), group or matrix.shape[1])
        try:
            grid = checked(fit(groups, bits, symmetric=symmetric, clip=clip, scale_dtype=scale_dtype), scale_dtype)
        except OverflowError as error:
            raise WeftError(f"The matrix cannot be coded: {error}; choose another dtype for scales.") from error
        codes = ungrouped(to_codes(groups, grid), matrix.shape[1])
        zero = None if symmetric else grid.zero.squeeze(-1)
        return cls.from_codes(codes, grid.scale.squeeze(-1).to(scale_dtype), zero, bits, group, matrix.dtype)

    @classmethod
    def example(cls, generator: Generator) -> IntegerCode:
        """One with 3 bits and a short last group."""
        return cls.from_matrix(torch.randn(12, 8, generator=generator), bits=3, group=3)

    def integer_codes(self) -> Tensor:
        """The codes (out, in) uint8."""
        return unpack(self.codes, self.bits, self.out_features * self.in_features).view(self.out_features, -1)

    def scale_matrix(self) -> Tensor:
        """The scales (out, groups) in the dtype that they are stored in."""
        dtype: torch.dtype = getattr(torch, self.scale_dtype)
        return numbers_of(self.scales, dtype)

    def zero_points(self) -> Tensor:
        """The zero points (out, groups) uint8, those of a symmetric grid too."""
        shape = (self.out_features, self.groups)
        if self.zeros is None:
            return torch.full(shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=self.codes.device)
        return unpack(self.zeros, self.bits, self.out_features * self.groups).view(shape)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        wanted = dtype or self.carrier.dtype
        codes, zero = (signed(t, self.bits) for t in (self.integer_codes(), self.zero_points()))
        values = grouped(codes, self.width) - zero.unsqueeze(-1)
        return ungrouped(product(values, self.scale_matrix().float().unsqueeze(-1), wanted), self.in_features)

    def coded(self) -> Coded:
        return Coded(
            self.codes, self.scale_matrix(), self.bits, self.width, zero=2 ** (self.bits - 1), zeros=self.zeros
        )

    def exact_codes(self) -> IntegerCodes:
        scales = self.scale_matrix().float()
        return IntegerCodes(
            self.integer_codes(), scales, self.zero_points(), self.bits, min(self.width, self.in_features)
        )

    def spec(self) -> Spec:
        own = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric, "scale_dtype": self.scale_dtype}
        return super().spec() | own
