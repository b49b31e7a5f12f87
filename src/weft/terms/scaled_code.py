"""ScaledCode: integer codes of a weight whose input channels were scaled before rounding.

T = C diag(r),   C the codes of W diag(1 / r) (out, in),   r (in,) in 16 bits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from weft.kernels.bits import numbers_of
from weft.terms.base import Spec, Term
from weft.terms.hooks import at_hand
from weft.terms.integer_code import IntegerCode
from weft.terms.quantized import Quantized

__all__ = ["ScaledCode"]


class ScaledCode(Quantized):
    """T[i, j] = C[i, j] r[j].

    Args:
        inner: C.
    """

    kind = "scaled_code"
    channels: Tensor  # uint8 (2 in,): the bits of fp16 numbers, which a cast of the model must not round

    def __init__(
        self, in_features: int, out_features: int, inner: Term, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        assert isinstance(inner, IntegerCode)
        self.inner = inner
        self.register_buffer("channels", torch.empty(2 * in_features, device=device, dtype=torch.uint8))

    @classmethod
    def from_code(cls, inner: IntegerCode, channels: Tensor) -> ScaledCode:
        """C and r (in,), which is kept in fp16."""
        term = cls(inner.in_features, inner.out_features, inner, device=channels.device, dtype=inner.carrier.dtype)
        term.channels = channels.detach().to(torch.float16).contiguous().view(torch.uint8)
        return term

    @classmethod
    def example(cls, generator: Generator) -> ScaledCode:
        """One with 4 bits."""
        inner = IntegerCode.from_matrix(torch.randn(12, 8, generator=generator), bits=4, group=4)
        return cls.from_code(inner, torch.rand(8, generator=generator) + 0.5)

    def channel_scales(self) -> Tensor:
        """r (in,) fp16."""
        return numbers_of(self.channels, torch.float16)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        with at_hand(self.inner):
            wide = self.inner.dense(torch.float32) * self.channel_scales().float()
        return wide.to(dtype or self.carrier.dtype)

    def spec(self) -> Spec:
        return super().spec() | {"inner": self.inner.spec()}
