"""TransposedCode: integer codes in groups along the outputs of each input: T = C^T, C the codes of W^T (in, out)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from weft.terms.base import Spec, Term
from weft.terms.hooks import at_hand
from weft.terms.integer_code import IntegerCode
from weft.terms.quantized import Quantized

__all__ = ["TransposedCode"]


class TransposedCode(Quantized):
    """T = C^T: the weights of one input share scales with each other, and with those of no other input.

    Args:
        inner: C (in, out).
    """

    kind = "transposed_code"

    def __init__(
        self, in_features: int, out_features: int, inner: Term, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        self.inner = inner

    @classmethod
    def from_code(cls, inner: IntegerCode) -> TransposedCode:
        """Of the codes of W^T (in, out)."""
        carrier = inner.carrier
        return cls(inner.out_features, inner.in_features, inner, device=carrier.device, dtype=carrier.dtype)

    @classmethod
    def example(cls, generator: Generator) -> TransposedCode:
        """One with 4 bits."""
        return cls.from_code(IntegerCode.from_matrix(torch.randn(8, 12, generator=generator), bits=4, group=4))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(self.inner, IntegerCode)
        with at_hand(self.inner):
            return self.inner.dense(dtype or self.carrier.dtype).mT

    def spec(self) -> Spec:
        return super().spec() | {"inner": self.inner.spec()}
