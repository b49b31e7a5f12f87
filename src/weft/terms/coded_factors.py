"""CodedFactors: T = scale * B A with factors of one to eight bits, trained through the quantiser; PackedFactors: the
same, in bits (one-bit adapters).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.bit_packing import looked_up, pack
from weft.kernels.bits import numbers_of
from weft.kernels.median_code import code_levels, fake_quantise, level_table, normalised, to_codes
from weft.terms.base import Spec
from weft.terms.factored import Factored

__all__ = ["CodedFactors", "PackedFactors"]


class CodedFactors(Factored):
    """T = scale * q(B) q(A), q the quantiser of `weft.kernels.median_code` over a whole factor.

    Jie, Wang and Deng, 2023, arXiv 2307.16867. The latent A (r, in) and B (out, r) are what is trained.

    Args:
        bits: of an entry: 1, 2, 4 or 8.
        dropout: probability of zeroing an entry of A x while training.
    """

    kind = "coded_factors"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bits: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, scale=scale, dropout=dropout)
        self.bits, self.levels = bits, code_levels(bits)
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        B, A = (fake_quantise(w.to(dtype or w.dtype), self.levels) for w in (self.B, self.A))
        return B, A

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.factors()
        hidden = F.dropout(F.linear(x, A.to(x.dtype)), self.dropout, self.training) * self.scale
        return F.linear(hidden, B.to(x.dtype))

    def packed(self) -> PackedFactors:
        """The same matrix in bits, frozen."""
        term = PackedFactors(self.in_features, self.out_features, self.rank, self.bits, scale=self.scale, device="meta")
        for name, factor in (("A", self.A), ("B", self.B)):
            u, mean, deviation = normalised(factor.detach().float())
            setattr(term, f"codes_{name}", pack(to_codes(u, self.levels).to(torch.uint8).flatten(), self.bits))
            setattr(term, f"moments_{name}", torch.stack([mean, deviation]).view(torch.int32))
        term.carrier = torch.empty(0, device=self.A.device, dtype=self.A.dtype)
        return term

    def spec(self) -> Spec:
        return super().spec() | {"bits": self.bits}


class PackedFactors(Factored):
    """T = scale * B A, each factor v[code] * deviation + mean of packed codes: r (in + out) b / 8 + 16 bytes."""

    kind = "packed_factors"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bits: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, scale=scale, dropout=dropout)
        self.bits, self.levels = bits, code_levels(bits)
        for name, numbers in (("A", rank * in_features), ("B", out_features * rank)):
            size = -(-numbers * bits // 8)
            self.register_buffer(f"codes_{name}", torch.zeros(size, dtype=torch.uint8, device=place.get("device")))
            # the bits of two fp32 numbers, which no cast of a model can round
            self.register_buffer(f"moments_{name}", torch.zeros(2, dtype=torch.int32, device=place.get("device")))
        self.register_buffer("carrier", torch.empty(0, **place))
        self.carrier: Tensor

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        dtype = dtype or self.carrier.dtype
        A = self._decoded("A", (self.rank, self.in_features), dtype)
        return self._decoded("B", (self.out_features, self.rank), dtype), A

    def _decoded(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, moments = self.get_buffer(f"codes_{name}"), numbers_of(self.get_buffer(f"moments_{name}"), torch.float32)
        moments = moments.to(torch.promote_types(dtype, torch.float32))
        levels = level_table(self.levels, device=moments.device, dtype=moments.dtype)
        values = looked_up(codes, self.bits, shape[0] * shape[1], levels)
        return (values * moments[1] + moments[0]).view(shape).to(dtype)

    def spec(self) -> Spec:
        return super().spec() | {"bits": self.bits}
