"""ActivatedLowRank: T(x) = scale * B act(A x), a low-rank map with a nonlinearity between its factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError, unknown
from weft.tensors import owned
from weft.terms.base import Spec, Term

__all__ = ["ACTIVATIONS", "ActivatedLowRank"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}
"""The nonlinearities by name."""


class ActivatedLowRank(Term):
    """T(x) = scale * B act(A x) with B (out, r) and A (r, in) (CoLA, Liu et al., 2025, arXiv 2502.10940).

    It has no matrix: `dense` raises.
    """

    kind = "activated_low_rank"
    linear: ClassVar[bool] = False

    def __init__(
        self, in_features: int, out_features: int, rank: int, activation: str = "silu", *, scale: float = 1.0,
        **place: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features)
        if activation not in ACTIVATIONS:
            raise unknown("activation between two factors", activation, ACTIVATIONS)
        self.rank, self.activation, self.scale = rank, activation, scale
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor, activation: str = "silu", *, scale: float = 1.0) -> ActivatedLowRank:
        """The term of given factors B (out, r) and A (r, in)."""
        term = cls(A.shape[1], B.shape[0], A.shape[0], activation, scale=scale, device="meta", dtype=A.dtype)
        term.A, term.B = nn.Parameter(owned(A.detach())), nn.Parameter(owned(B.detach()))
        return term

    @classmethod
    def example(cls, generator: torch.Generator) -> ActivatedLowRank:
        """A small one of random numbers."""
        B, A = (torch.randn(*shape, generator=generator) for shape in ((12, 3), (3, 8)))
        return cls.from_factors(B, A, scale=0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](F.linear(x, self.A.to(x.dtype)))
        return F.linear(hidden if self.scale == 1.0 else hidden * self.scale, self.B.to(hidden.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        raise WeftError(
            "A product with a nonlinearity between its factors is no matrix: it cannot be merged, and no other format "
            "holds it; keep the weft directory, which transformers opens after `import weft`."
        )

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank, "activation": self.activation, "scale": self.scale}
