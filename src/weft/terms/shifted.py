"""Shifted: T = now - start, what training has made of a part that was taken out of the base."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.lean_linear import Part
from weft.terms.base import Factors, Spec, Term

__all__ = ["Shifted"]


class Shifted(Term):
    """T = T_now - T_start, where `start` is a frozen copy of `now` as it was at the beginning.

    A method that starts its factors on a part of W and subtracts that part from the base (PiSSA, CorDA, LoRA-GA, SORSA
    ...) is W + Shifted: the base keeps its bytes, the residual is an exact sum instead of a rounded matrix, and T is
    exactly zero at the start, in any dtype. Dropout is one mask for both parts, so that this holds in training too.

    Args:
        term: the trainable term, at its start.
    """

    kind = "shifted"

    def __init__(
        self, in_features: int, out_features: int, term: Term, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features)
        self.dropout, term.dropout = term.dropout, 0.0
        self.now = term
        self.start = copy.deepcopy(term).requires_grad_(False)

    @classmethod
    def from_term(cls, term: Term) -> Shifted:
        """The shift of `term`, zero until `term` is trained."""
        return cls(term.in_features, term.out_features, term)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        moved: Tensor = self.now(x) - self.start(x)
        return moved

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.now.dense(dtype) - self.start.dense(dtype)

    def exact_factors(self) -> Factors | None:
        now, start = self.now.exact_factors(), self.start.exact_factors()
        if now is None or start is None:
            return None
        return torch.cat([now[0], -start[0]], dim=1), torch.cat([now[1], start[1]])

    def lean_parts(self) -> list[Part] | None:
        now, start = self.now.lean_parts(), self.start.lean_parts()
        if now is None or start is None or (self.dropout and self.training):
            return None
        return [*now, *(part._replace(scale=-part.scale) for part in start)]

    def spec(self) -> Spec:
        return super().spec() | {"term": self.now.spec() | ({"dropout": self.dropout} if self.dropout else {})}
