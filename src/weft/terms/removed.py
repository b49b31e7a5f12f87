"""Removed: T = -B A, components that are taken out of the base (KaSA)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from weft.terms.low_rank import LowRank

__all__ = ["Removed"]


class Removed(LowRank):
    """T = scale * B A with scale -1: a part B A of the base that is left out of the sum, whose bytes stay.

    Two of them in one layer would take the same part out twice, so adapters that hold one cannot stand together.
    """

    kind = "removed"
    alone: ClassVar[bool] = True

    @classmethod
    def of(cls, B: Tensor, A: Tensor) -> Removed:
        """Without B A (out, r) (r, in), frozen."""
        term = cls.from_factors(B, A, scale=-1.0).requires_grad_(False)
        assert isinstance(term, cls)
        return term
