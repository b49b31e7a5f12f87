"""Quantised terms: a frozen matrix in few bits a weight, decoded for the moment of each product.

The forward pass keeps nothing for the backward pass, which decodes again: y = x W_q^T, dx = dy W_q (Chai et al., 2023,
arXiv 2306.08162, section 3). `requires_grad` has nothing to set: the codes are buffers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.bits import numbers_of, product
from weft.kernels.coded_product import Coded, coded_product, worthwhile
from weft.kernels.lean_linear import Weight, frozen_linear
from weft.kernels.normal_float import NF4, Code, Format, blank, block_scales, decode, encode, levels
from weft.terms.base import IntegerCodes, Spec, Term

__all__ = ["Int8", "NormalFloat", "Quantized"]


class Quantized(Term):
    """A frozen term in code. `carrier` is empty: its dtype is the one that `dense` gives, its device the term's."""

    carrier: Tensor

    def __init__(self, in_features: int, out_features: int, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("carrier", torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # exporting, too
            # the compiler's partitioner decides what is made twice
            return F.linear(x, self.dense(x.dtype))
        coded = self.coded() if worthwhile(x) else None
        return frozen_linear(x, self.dense) if coded is None else coded_product(x, coded, self.out_features)

    def coded(self) -> Coded | None:
        """The code as a product with few tokens reads it; None where only the matrix can be multiplied."""
        return None

    def lean_weight(self) -> Weight | None:
        return self.dense

    @property
    def num_params(self) -> int:
        """Weights: every one is stored, in fewer bits."""
        return self.in_features * self.out_features


class NormalFloat(Quantized):
    """T[i, j] = level[code] * scale of its block (`weft.kernels.normal_float`); by default doubly quantised NF4.

    Blocks run over the flattened matrix, row after row: slice a matrix before quantising it, not after.

    Args:
        bits: of a code: 2, 3, 4 or 8.
        block: weights a scale.
        scale_bits: of a scale's code; None keeps scales in fp32.
        scale_block: scales a step.
        scale_dtype: of the steps, "float32", "bfloat16" or "float16".
    """

    kind = "normal_float"
    codes: Tensor
    scales: Tensor
    offset: Tensor
    steps: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        block: int = 64,
        scale_bits: int | None = 8,
        scale_block: int = 256,
        scale_dtype: str = "float32",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        self.format = Format(bits, block, scale_bits, scale_block, scale_dtype)
        for name, tensor in blank(out_features * in_features, self.format, device)._asdict().items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_matrix(cls, matrix: Tensor, format: Format = NF4) -> NormalFloat:
        """The nearest codes of `matrix` (out, in)."""
        term = cls(matrix.shape[1], matrix.shape[0], **format._asdict(), device=matrix.device, dtype=matrix.dtype)
        for name, tensor in encode(matrix, format)._asdict().items():
            term.register_buffer(name, tensor)
        return term

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        code = Code(self.codes, self.scales, self.offset, self.steps)
        return decode(code, (self.out_features, self.in_features), self.format, dtype or self.carrier.dtype)

    def coded(self) -> Coded:
        code = Code(self.codes, self.scales, self.offset, self.steps)
        scales = block_scales(code, self.format, -(-self.out_features * self.in_features // self.format.block))
        table = levels(self.format.bits, device=self.codes.device)
        return Coded(self.codes, scales, self.format.bits, self.format.block, flat=True, levels=table)

    def spec(self) -> Spec:
        return super().spec() | self.format._asdict()


class Int8(Quantized):
    """T[i, j] = code * scale_i / 127 with codes from -127 to 127: one scale a row, its absolute maximum."""

    kind = "int8"
    codes: Tensor
    scales: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        self.register_buffer("codes", torch.empty(out_features, in_features, device=device, dtype=torch.int8))
        # the bits of fp32 numbers: a cast of the model must not round them
        self.register_buffer("scales", torch.empty(out_features, device=device, dtype=torch.int32))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Int8:
        """The nearest codes of `matrix` (out, in)."""
        term = cls(matrix.shape[1], matrix.shape[0], device=matrix.device, dtype=matrix.dtype)
        wide = matrix.detach().float()
        scales = wide.abs().amax(1)
        term.codes = (wide / torch.where(scales > 0, scales, 1.0).unsqueeze(1) * 127).round().to(torch.int8)
        term.scales = scales.view(torch.int32)
        return term

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        scales = numbers_of(self.scales, torch.float32) / 127
        return product(self.codes, scales.unsqueeze(1), dtype or self.carrier.dtype)

    def coded(self) -> Coded:
        return Coded(self.codes, numbers_of(self.scales, torch.float32) / 127, 8, self.in_features)

    def exact_codes(self) -> IntegerCodes:
        scales = numbers_of(self.scales, torch.float32).unsqueeze(1) / 127
        codes = (self.codes.short() + 128).to(torch.uint8)
        return IntegerCodes(codes, scales, torch.full_like(scales, 128, dtype=torch.uint8), 8, self.in_features)
