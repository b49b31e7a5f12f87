"""TrainedFloat: numbers of 8 bits that are trained as they are stored, with no wider copy of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from weft.errors import WeftError
from weft.kernels.float_format import FORMATS, float_codes
from weft.kernels.lean_linear import Weight
from weft.kernels.transient_linear import Summand, transient_linear
from weft.terms.base import Spec
from weft.terms.float_code import FloatCode

__all__ = ["TrainedFloat"]

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class TrainedFloat(FloatCode):
    """T[i, j] = value(code) * 2^e, e the same for the whole matrix and fixed, so that a step moves codes alone.

    Codes are no parameter, for autograd gives a tensor's gradient the tensor's dtype. While a `probe` is there, a zero
    that poses as the matrix (out, in), the gradient of T arrives at it in every backward pass, in the dtype of the
    products; whoever trains reads it there and calls `store`.

    Args:
        element: "e4m3" or "e5m2".
    """

    kind = "trained_float"
    lean_alone = True
    probe: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, *, element: str = "e4m3", **place: Any) -> None:
        if element not in _DTYPES:
            raise WeftError(f"Numbers that are trained in 8 bits are {' or '.join(_DTYPES)}, not {element!r}.")
        super().__init__(in_features, out_features, element=element, group=None, scale="float32", **place)

    @classmethod
    def of(cls, W: Tensor, element: str, headroom: int) -> TrainedFloat:
        """The nearest of a matrix (out, in), whose numbers may grow to 2^headroom times the largest of them."""
        term = cls(W.shape[1], W.shape[0], element=element, device=W.device, dtype=W.dtype)
        exponent = torch.frexp(W.detach().float().abs().amax()).exponent - 1 + headroom - FORMATS[element].top
        scale = torch.ldexp(torch.ones((), device=W.device), exponent)
        term.scales.copy_(scale.expand(len(W), 1).contiguous().view(torch.uint8))
        term.store(W)
        return term

    @classmethod
    def example(cls, generator: Generator) -> TrainedFloat:
        """One of e4m3."""
        return cls.of(torch.randn(12, 8, generator=generator), "e4m3", 2)

    @torch.no_grad()
    def store(self, W: Tensor, generator: Generator | None = None) -> None:
        """The codes nearest to a matrix (out, in), or drawn beside it; what is beyond the largest becomes it."""
        self.codes.copy_(float_codes(W.float() / self.scale_matrix(), self.element, generator).flatten())

    def forward(self, x: Tensor) -> Tensor:
        if self.probe is None:
            return super().forward(x)
        add = partial(_add_numbers, _DTYPES[self.element])
        summand = Summand(add, _pull_probe, 1.0, (self.codes, self.scale_matrix(), self.probe), cast=False)
        return transient_linear(x, [summand], self.out_features)

    def lean_weight(self) -> Weight | None:
        return None  # asked once, before there is a probe

    def finished(self) -> FloatCode:
        """The same numbers at rest, as `fp8` has them and formats can hold them."""
        code = FloatCode(
            self.in_features, self.out_features, element=self.element, group=None, scale="float32",
            device=self.codes.device, dtype=self.carrier.dtype,
        )  # fmt: skip
        code.codes, code.scales = self.codes, self.scales
        return code

    def spec(self) -> Spec:
        own = super().spec()
        return {key: own[key] for key in own if key not in ("group", "scale")}


def _add_numbers(dtype: torch.dtype, W: Tensor, _: float, codes: Tensor, scales: Tensor, probe: Tensor) -> None:
    W.addcmul_(codes.view(W.shape).view(dtype).to(W.dtype), scales.to(W.dtype))


def _pull_probe(G: Tensor, _: float, codes: Tensor, scales: Tensor, probe: Tensor) -> tuple[None, None, Tensor]:
    return None, None, G
