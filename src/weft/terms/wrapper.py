"""Wrapper: a term that is a function of other terms, W' = f(T_1 + ... + T_k), and stands in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from weft.terms.base import Spec, Term
from weft.terms.hooks import at_hand

__all__ = ["Wrapper"]


class Wrapper(Term):
    """The base of the terms that rescale or transform the whole weight (DoRA's magnitudes, Bone's block-affine form).

    `inner` holds the wrapped terms while the adapter is in use; it is empty while the adapter is put aside or saved on
    its own.
    """

    alone: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, inner: Mapping[str, Term] | None = None) -> None:
        super().__init__(in_features, out_features)
        self.inner = nn.ModuleDict(dict(inner or {}))

    def wrap(self, terms: Mapping[str, Term]) -> None:
        """Take `terms` as the weight W to be transformed."""
        self.inner = nn.ModuleDict(dict(terms))

    def unwrap(self) -> dict[str, Term]:
        """Let go of the wrapped terms and return them."""
        terms, self.inner = dict(self.inner.items()), nn.ModuleDict()
        return terms  # type: ignore[return-value]

    def base(self, x: Tensor) -> Tensor:
        """W x, the wrapped terms alone: x (..., in) -> (..., out)."""
        first, *rest = self.inner.values()
        y: Tensor = first(x)
        for term in rest:
            y = y + term(x)
        return y

    def base_dense(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), the wrapped terms alone."""
        with at_hand(self.inner):
            first, *rest = (term.dense(dtype) for term in self.inner.values())  # type: ignore[operator]
        total: Tensor = first
        for matrix in rest:
            total = total + matrix
        return total

    def own_state(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().own_state().items() if not name.startswith("inner.")}

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in super().own_parameters() if not pair[0].startswith("inner."))

    def own_spec(self) -> Spec:
        return {**self.spec(), "inner": {}}

    def spec(self) -> Spec:
        return super().spec() | {"inner": {name: term.spec() for name, term in self.inner.items()}}  # type: ignore[operator]

    def _reference(self) -> Tensor:
        for term in self.inner.values():
            assert isinstance(term, Term)
            return term._reference()
        return super()._reference()
