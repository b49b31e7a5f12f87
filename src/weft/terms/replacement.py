"""Replacement: T = code + update in the base's place; the base itself is not used while the adapter is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.terms.base import Spec, Term
from weft.terms.wrapper import Wrapper

__all__ = ["Replacement"]


class Replacement(Wrapper):
    """T = code + update, two terms that stand for the whole weight (LQ-LoRA as an adapter that can be taken off).

    Args:
        code: the frozen part.
        update: the trained part.
        inner: the terms replaced; let go of at once, since the product does not need them.
    """

    kind = "replacement"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        code: Term,
        update: Term,
        inner: Mapping[str, Term] | None = None,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features)
        self.code, self.update = code, update

    def wrap(self, terms: Mapping[str, Term]) -> None:
        """Nothing is taken: the replaced terms stay where the adapter's book keeps them."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.code(x) + self.update(x)
        return y

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        matrix: Tensor = self.code.dense(dtype) + self.update.dense(dtype)
        return matrix

    def spec(self) -> Spec:
        return super().spec() | {"code": self.code.spec(), "update": self.update.spec()}

    def _reference(self) -> Tensor:
        return self.code._reference()
