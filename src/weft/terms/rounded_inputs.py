"""RoundedInputs: a linear term whose inputs are rounded to integers first, each token by its own scale."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from weft.errors import WeftError
from weft.kernels.straight_through import straight_through
from weft.terms.base import Spec, Term
from weft.terms.hooks import at_hand

__all__ = ["RoundedInputs"]

_LEAST, _EPS = 1e-5, 1e-6


class RoundedInputs(Term):
    """y = term(q) / s,   q = clip(round(s u), -2^(b-1), 2^(b-1) - 1),   s = (2^(b-1) - 1) / max|u| of each token

    with u = x / rms(x), or x itself. Gradients pass the rounding as if it were not there, s counting as a constant
    (BitNet b1.58, Ma et al., 2024, arXiv 2402.17764). While the term within blends its own rounding in (`blend`), so
    much of q is rounded. It has no matrix: `dense` raises.

    Args:
        term: linear; it meets whole numbers, which bf16 holds exactly.
        bits: b, 2 to 8; None rounds nothing.
        normalise: each token to a root mean square of 1, without a gain.
        parts: of each token, which have a scale each; of more than one, the term meets q / s.
    """

    kind = "rounded_inputs"
    linear: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        term: Term,
        bits: int | None = 8,
        normalise: bool = True,
        parts: int = 1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        if bits is not None and bits not in range(2, 9):
            raise WeftError(f"Inputs are rounded to 2 to 8 bits, not to {bits}.")
        self.term, self.bits, self.normalise, self.parts = term, bits, normalise, parts

    @classmethod
    def of(cls, term: Term, bits: int | None = 8, normalise: bool = True, parts: int = 1) -> RoundedInputs:
        """The term, its inputs rounded."""
        return cls(term.in_features, term.out_features, term, bits, normalise, parts)

    @classmethod
    def example(cls, generator: Generator) -> RoundedInputs:
        """One of ternary weights in training, half way."""
        from weft.terms.ternary import TernaryLatent

        return cls.of(TernaryLatent.example(generator))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        u = F.rms_norm(wide, (self.in_features,), eps=_EPS) if self.normalise else wide
        if self.bits is None:
            bare: Tensor = self.term(u.to(x.dtype))
            return bare
        last = 2 ** (self.bits - 1) - 1
        if self.parts > 1:
            u = u.reshape(*u.shape[:-1], self.parts, -1)
        s = last / u.detach().abs().amax(-1, keepdim=True).clamp(min=_LEAST)
        q = self._rounded(u * s, last)
        if self.parts > 1:
            each: Tensor = self.term((q / s).flatten(-2).to(x.dtype))
            return each
        y: Tensor = self.term(q.to(x.dtype))
        return (y / s).to(y.dtype)

    def _rounded(self, u: Tensor, last: int) -> Tensor:
        q = u.detach().round().clamp_(-last - 1, last)
        if self.training and getattr(self.term, "blend", None) is not None:
            with at_hand(self.term):
                q = torch.lerp(u.detach(), q, self.term.get_buffer("blend").to(u.dtype))
        return straight_through(q, u)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        raise WeftError(
            "A layer that rounds its inputs is no matrix: it cannot be merged, and no other format holds it; "
            "keep the weft directory, which transformers opens after `import weft`."
        )

    def finished(self) -> RoundedInputs:
        return self.of(self.term.finished(), self.bits, self.normalise, self.parts)

    @property
    def num_params(self) -> int:
        """Those of the term within."""
        return self.term.num_params

    def spec(self) -> Spec:
        own = {"term": self.term.spec(), "bits": self.bits, "normalise": self.normalise}
        return super().spec() | own | ({"parts": self.parts} if self.parts > 1 else {})

    def _reference(self) -> Tensor:
        return self.term._reference()
