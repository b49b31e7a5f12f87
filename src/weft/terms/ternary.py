"""TernaryLatent and Ternary: T = g t with t in {-1, 0, 1} and one scale g a matrix, while it is trained and stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.errors import unknown
from weft.kernels.bits import numbers_of, product
from weft.kernels.straight_through import straight_through
from weft.kernels.transient_linear import Summand
from weft.kernels.trits import SCALES, packed_trits, scale_of, to_trits, trits_of, trits_size
from weft.terms.base import IntegerCodes, Spec, Term
from weft.terms.quantized import Quantized

__all__ = ["Ternary", "TernaryLatent"]


class TernaryLatent(Term):
    """T = V + blend (g t(V) - V) with V (out, in) stored and trained whole, g and t anew from V in every forward pass
    (`weft.kernels.trits`), the gradient of T going to V as it is; blend from 0 (V itself) to 1 set from outside (BitNet
    b1.58, Ma et al., 2024, arXiv 2402.17764).

    Evaluation goes by blend = 1, which is what will be left. T is not kept for the backward pass. Codes are those of V
    as it is stored, whatever the precision of the product.

    Args:
        scale: g is the "median" or the "mean" of |V|.
    """

    kind = "ternary_latent"
    lean_alone = True
    blend: Tensor

    def __init__(self, in_features: int, out_features: int, scale: str = "median", **place: Any) -> None:
        super().__init__(in_features, out_features)
        if scale not in SCALES:
            raise unknown("scale of ternary weights", scale, SCALES)
        self.scale_by = scale
        self.V = nn.Parameter(torch.empty(out_features, in_features, **place))
        self.register_buffer("blend", torch.empty(1, **place))

    @classmethod
    def from_matrix(cls, W: Tensor, scale: str = "median") -> TernaryLatent:
        """The term of latent weights W (out, in), whose blend is 1."""
        term = cls(W.shape[1], W.shape[0], scale, device=W.device, dtype=W.dtype)
        with torch.no_grad():
            term.V.copy_(W)
            term.blend.fill_(1.0)
        return term

    @classmethod
    def example(cls, generator: Generator) -> TernaryLatent:
        """A small one of random numbers, half way."""
        term = cls.from_matrix(torch.randn(12, 8, generator=generator))
        term.blend.fill_(0.5)
        return term

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        V = self.V.to(_wide(self.V, dtype or self.V.dtype))
        T = _blended(V.detach(), self._scale(), self._blend())
        return straight_through(T, V).to(dtype or self.V.dtype)

    def summand(self) -> Summand:
        return Summand(_add, _pull, 1.0, (self.V, self._scale(), self._blend()), cast=False)

    def finished(self) -> Ternary:
        return Ternary.from_matrix(self.V.detach(), self.scale_by)

    def spec(self) -> Spec:
        return super().spec() | {"scale": self.scale_by}

    def _scale(self) -> Tensor:
        """g (), found once a pass, forward and backward."""
        return scale_of(self.V.detach().to(_wide(self.V, torch.float32)), self.scale_by)

    def _blend(self) -> Tensor:
        return self.blend if self.training else torch.ones_like(self.blend)


class Ternary(Quantized):
    """T[i, j] = g t[i, j], five t a byte, row after row, and g in 32 bits: 1.6 bits a weight and 4 bytes a matrix."""

    kind = "ternary"
    codes: Tensor  # uint8
    scale: Tensor  # int32 (1,), the bits of an fp32 number: a cast of the model must not round it

    def __init__(
        self, in_features: int, out_features: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        size = trits_size(out_features * in_features)
        self.register_buffer("codes", torch.empty(size, device=device, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(1, device=device, dtype=torch.int32))

    @classmethod
    def from_matrix(cls, matrix: Tensor, scale: str = "median") -> Ternary:
        """The nearest numbers to `matrix` (out, in) / g."""
        term = cls(matrix.shape[1], matrix.shape[0], device=matrix.device, dtype=matrix.dtype)
        wide = matrix.detach().to(_wide(matrix, torch.float32))
        g = scale_of(wide, scale)
        term.codes = packed_trits(to_trits(wide, g).flatten())
        term.scale = g.float().reshape(1).view(torch.int32)
        return term

    @classmethod
    def example(cls, generator: Generator) -> Ternary:
        """One whose last byte is not full."""
        return cls.from_matrix(torch.randn(12, 8, generator=generator))

    def trits(self) -> Tensor:
        """t (out, in) int8."""
        return trits_of(self.codes, self.out_features * self.in_features).view(self.out_features, -1)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return product(self.trits(), numbers_of(self.scale, torch.float32), dtype or self.carrier.dtype)

    def exact_codes(self) -> IntegerCodes:
        scales = numbers_of(self.scale, torch.float32).expand(self.out_features).unsqueeze(1)
        codes, zeros = (self.trits() + 2).to(torch.uint8), torch.full_like(scales, 2, dtype=torch.uint8)
        return IntegerCodes(codes, scales, zeros, 2, self.in_features)

    @property
    def rate_scale(self) -> float | None:
        return None  # `scale` is stored, and no factor of trained numbers


def _wide(V: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which codes are found: V's own, fp32 at least, and that of the product where it is wider."""
    return torch.promote_types(torch.promote_types(V.dtype, torch.float32), dtype)


def _blended(V: Tensor, g: Tensor, blend: Tensor) -> Tensor:
    g = g.to(V.dtype)
    return torch.lerp(V, to_trits(V, g) * g, blend.to(V.dtype))  # exact at both ends


def _add(W: Tensor, scale: float, V: Tensor, g: Tensor, blend: Tensor) -> None:
    W.add_(_blended(V.to(_wide(V, W.dtype)), g, blend), alpha=scale)


def _pull(G: Tensor, scale: float, V: Tensor, g: Tensor, blend: Tensor) -> tuple[Tensor, None, None]:
    return G if scale == 1.0 else G * scale, None, None
