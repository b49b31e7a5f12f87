"""A term of integer codes with a scale and a zero point a group, written for tests alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.terms.base import IntegerCodes, Spec
from weft.terms.quantized import Quantized


class Affine(Quantized):
    kind = "affine_of_tests"

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        self.bits, self.group = bits, group
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.uint8, device=device))
        groups = (out_features, -(-in_features // group))
        self.register_buffer("scales", torch.empty(groups, dtype=torch.int32, device=device))  # the bits of fp32
        self.register_buffer("zeros", torch.empty(groups, dtype=torch.uint8, device=device))

    @classmethod
    def nearest(cls, matrix: Tensor, bits: int, group: int, symmetric: bool) -> Affine:
        """The nearest codes of `matrix`, with scales of 8 significant bits, which fp16, bf16 and fp32 hold alike."""
        out, inn = matrix.shape
        term, top = cls(inn, out, bits=bits, group=group, dtype=matrix.dtype), 2**bits - 1
        blocks = matrix.detach().float().view(out, -1, group)
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        span = 2 * torch.maximum(-low, high) if symmetric else high - low
        scales = (span / top).bfloat16().clamp(min=2.0**-12).float()
        zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(0, top)
        codes = ((blocks / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, top)
        term.codes, term.zeros = codes.view(out, inn).to(torch.uint8), zeros.to(torch.uint8)
        term.scales = scales.view(torch.int32)
        return term

    def integer_codes(self) -> IntegerCodes:
        return IntegerCodes(self.codes, self.scales.view(torch.float32), self.zeros, self.bits, self.group)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        codes = self.codes.view(self.out_features, -1, self.group).float()
        values = (codes - self.zeros.unsqueeze(-1)) * self.scales.view(torch.float32).unsqueeze(-1)
        return values.view(self.out_features, self.in_features).to(dtype or self.carrier.dtype)

    def spec(self) -> Spec:
        return super().spec() | {"bits": self.bits, "group": self.group}
