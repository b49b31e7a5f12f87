"""SteppedCode: integer codes of which those of some inputs are trained, in steps of a code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from weft.errors import WeftError
from weft.kernels.straight_through import straight_through
from weft.terms.base import Spec, Term
from weft.terms.hooks import at_hand
from weft.terms.integer_code import IntegerCode

__all__ = ["SteppedCode"]


class SteppedCode(Term):
    """T = C, but in the columns `places` (k,): (clip(round(V), 0, 2^b - 1) - zero) scale, V (out, k) in codes, trained.

    Rounding counts as the identity for V's gradient, which is that of T times the scale, and nothing where V is
    clipped. C is decoded for the moment of each product, and of the inputs only those at `places` are kept.

    Args:
        inner: C.
        trained: k.

    Raises:
        WeftError: no column is trained, or more than there are.
    """

    kind = "stepped_code"
    lean_alone = True
    places: Tensor  # (k,) rising

    def __init__(
        self, in_features: int, out_features: int, inner: Term, trained: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features)
        assert isinstance(inner, IntegerCode)
        if not 1 <= trained <= in_features:
            raise WeftError(f"{trained} trained columns are none of {in_features}; give 1 to {in_features}.")
        self.inner, self.count = inner, trained
        self.V = nn.Parameter(torch.empty(out_features, trained, device=device, dtype=dtype))
        self.register_buffer("places", torch.empty(trained, device=device, dtype=torch.int64))

    @classmethod
    def from_code(cls, code: IntegerCode, places: Tensor) -> SteppedCode:
        """Of a code, the same matrix, whose columns at `places` (k,) are trained: V in fp32."""
        device = code.codes.device
        term = cls(code.in_features, code.out_features, code, len(places), device=device, dtype=torch.float32)
        with torch.no_grad():
            term.places.copy_(places.sort().values)
            term.V.copy_(code.integer_codes()[:, term.places])
        return term

    @classmethod
    def example(cls, generator: Generator) -> SteppedCode:
        """One with 3 bits, three columns of which have moved."""
        code = IntegerCode.from_matrix(torch.randn(12, 8, generator=generator), bits=3, group=3)
        term = cls.from_code(code, torch.tensor([1, 5, 7]))
        with torch.no_grad():
            term.V.add_(torch.randn(12, 3, generator=generator))
        return term

    def forward(self, x: Tensor) -> Tensor:
        with at_hand(self.inner):
            change = (self._columns(self._stepped()) - self._columns(self._fixed())).to(x.dtype)
        y: Tensor = self.inner(x)
        return y + F.linear(x.index_select(-1, self.places), change)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        wanted = dtype or self._reference().dtype
        wide = torch.promote_types(wanted, torch.float32)
        with at_hand(self.inner):
            columns = self._columns(self._stepped().to(wide))
            return self.inner.dense(wide).index_copy(1, self.places, columns.to(wide)).to(wanted)

    def steps(self) -> Tensor:
        """The scale of each trained number (out, k), fp32."""
        groups = self.places // self.inner.width
        return self.inner.scale_matrix().float()[:, groups]

    def finished(self) -> IntegerCode:
        codes = self.inner.integer_codes()
        codes[:, self.places] = self._stepped().detach().to(torch.uint8)
        zeros = None if self.inner.symmetric else self.inner.zero_points()
        of, dtype = self.inner, self.inner.carrier.dtype
        return IntegerCode.from_codes(codes, of.scale_matrix(), zeros, of.bits, of.group, dtype)

    @property
    def num_params(self) -> int:
        """Weights: those that are trained are held twice."""
        return self.inner.num_params

    def spec(self) -> Spec:
        return super().spec() | {"inner": self.inner.spec(), "trained": self.count}

    def _reference(self) -> Tensor:
        return self.inner.carrier

    def _stepped(self) -> Tensor:
        """Whole codes (out, k), with the gradient of V where it is not clipped."""
        clipped = self.V.clamp(0, 2**self.inner.bits - 1)
        return straight_through(clipped.detach().round(), clipped)

    def _fixed(self) -> Tensor:
        return self.inner.integer_codes()[:, self.places].to(self.V.dtype)

    def _columns(self, codes: Tensor) -> Tensor:
        """The numbers (out, k) of codes."""
        zeros = self.inner.zero_points()[:, self.places // self.inner.width]
        return (codes - zeros.to(codes.dtype)) * self.steps().to(codes.dtype)
