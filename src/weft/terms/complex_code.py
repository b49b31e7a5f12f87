"""ComplexLatent and ComplexCode: a matrix of complex numbers 1, i, -1 and -i times a scale an axis, while it is trained
and stored. The first half of the inputs and outputs are real parts, the second half imaginary ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.errors import WeftError
from weft.kernels.bit_packing import pack, packed_size, unpack
from weft.kernels.bits import numbers_of
from weft.kernels.complex_codes import block, block_gradients, parts, to_codes
from weft.kernels.transient_linear import Summand
from weft.terms.base import Term
from weft.terms.quantized import Quantized

__all__ = ["ComplexCode", "ComplexLatent"]


class ComplexLatent(Term):
    """T = [[Q_r, Q_i], [Q_i, -Q_r]] of V = V_r + i V_i (out / 2, in / 2), stored and trained whole, Q anew from V in
    every forward pass (`weft.kernels.complex_codes`), the gradient of Q going to V as it is (iFairy, 2025, arXiv
    2508.05571).

    T is not kept for the backward pass. Codes are those of V as it is stored, whatever the precision of the product.

    Raises:
        WeftError: a number of inputs or outputs that has no halves.
    """

    kind = "complex_latent"
    lean_alone = True

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features)
        _check_even(in_features, out_features)
        self.V_r = nn.Parameter(torch.empty(out_features // 2, in_features // 2, **place))
        self.V_i = nn.Parameter(torch.empty(out_features // 2, in_features // 2, **place))

    @classmethod
    def from_matrix(cls, W: Tensor) -> ComplexLatent:
        """The complex numbers whose matrix is nearest to W (out, in)."""
        term = cls(W.shape[1], W.shape[0], device=W.device, dtype=W.dtype)
        with torch.no_grad():
            for part, twice in zip((term.V_r, term.V_i), block_gradients(W), strict=True):
                part.copy_(twice / 2)
        return term

    @classmethod
    def example(cls, generator: Generator) -> ComplexLatent:
        """A small one of random numbers."""
        return cls.from_matrix(torch.randn(12, 8, generator=generator))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        V_r, V_i = (V.to(_wide(V, dtype or V.dtype)) for V in (self.V_r, self.V_i))
        T = block(*parts(*to_codes(V_r.detach(), V_i.detach())))
        through = block(V_r - V_r.detach(), V_i - V_i.detach())  # nothing, with the gradient of V
        return (T + through).to(dtype or self.V_r.dtype)

    def summand(self) -> Summand:
        return Summand(_add, _pull, 1.0, (self.V_r, self.V_i), cast=False)

    def finished(self) -> ComplexCode:
        return ComplexCode.from_parts(self.V_r.detach(), self.V_i.detach())


class ComplexCode(Quantized):
    """T = [[Q_r, Q_i], [Q_i, -Q_r]], four codes of Q a byte, row after row, and two scales in 32 bits: half a bit a
    number of the matrix, two a complex weight.

    Raises:
        WeftError: a number of inputs or outputs that has no halves.
    """

    kind = "complex_code"
    codes: Tensor  # uint8
    scales: Tensor  # int32 (2,), the bits of fp32 numbers: a cast of the model must not round them

    def __init__(
        self, in_features: int, out_features: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        _check_even(in_features, out_features)
        size = packed_size(out_features * in_features // 4, 2)
        self.register_buffer("codes", torch.empty(size, device=device, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(2, device=device, dtype=torch.int32))

    @classmethod
    def from_parts(cls, V_r: Tensor, V_i: Tensor) -> ComplexCode:
        """The nearest codes of V_r + i V_i (out / 2, in / 2)."""
        term = cls(2 * V_r.shape[1], 2 * V_r.shape[0], device=V_r.device, dtype=V_r.dtype)
        codes, scales = to_codes(*(V.to(_wide(V, torch.float32)) for V in (V_r, V_i)))
        term.codes = pack(codes.flatten(), 2)
        term.scales = scales.float().view(torch.int32)
        return term

    @classmethod
    def example(cls, generator: Generator) -> ComplexCode:
        """A small one of random numbers."""
        return cls.from_parts(*torch.randn(2, 6, 4, generator=generator))

    def complex_codes(self) -> Tensor:
        """The codes (out / 2, in / 2) uint8: k for the k-th power of i."""
        count = self.out_features * self.in_features // 4
        return unpack(self.codes, 2, count).view(self.out_features // 2, -1)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        scales = numbers_of(self.scales, torch.float32)
        return block(*parts(self.complex_codes(), scales)).to(dtype or self.carrier.dtype)


def _check_even(in_features: int, out_features: int) -> None:
    if in_features % 2 or out_features % 2:
        raise WeftError(
            f"A matrix of {out_features} x {in_features} has no halves for real and imaginary parts; "
            "both sides must be even."
        )


def _wide(V: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which codes are found: V's own, fp32 at least, and that of the product where it is wider."""
    return torch.promote_types(torch.promote_types(V.dtype, torch.float32), dtype)


def _add(W: Tensor, scale: float, V_r: Tensor, V_i: Tensor) -> None:
    wide = _wide(V_r, W.dtype)
    W.add_(block(*parts(*to_codes(V_r.to(wide), V_i.to(wide)))), alpha=scale)


def _pull(G: Tensor, scale: float, V_r: Tensor, V_i: Tensor) -> tuple[Tensor, Tensor]:
    return block_gradients(G if scale == 1.0 else G * scale)
