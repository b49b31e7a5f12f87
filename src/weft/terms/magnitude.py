"""Magnitude: T = diag(m / n) (W + U), each row of the updated weight scaled to a trained length (DoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.autocast import without_autocast
from weft.terms.base import Lora, Spec, Term
from weft.terms.hooks import at_hand
from weft.terms.low_rank import LowRank
from weft.terms.wrapper import Wrapper

__all__ = ["Magnitude"]


class Magnitude(Wrapper):
    """T = diag(m / n) V with V = W + s B A and n_i = ||V_i||_2, recomputed at each step and constant for the gradient.

    Liu et al., 2024, arXiv 2402.09353, section 4: the gradient through n is dropped, which saves an out x in buffer.
    Row norms need no V:

        n_i^2 = ||W_i||^2 + 2 s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T

    Args:
        update: the low-rank U = s B A.
        inner: the terms of W.
    """

    kind = "magnitude"

    def __init__(
        self, in_features: int, out_features: int, update: Term, inner: Mapping[str, Term] | None = None, **place: Any
    ) -> None:
        super().__init__(in_features, out_features, inner)
        assert isinstance(update, LowRank)
        self.update = update
        self.magnitude = nn.Parameter(torch.empty(out_features, **place))
        self.register_buffer("base_squares", torch.empty(out_features, device=place.get("device"), dtype=torch.float32))
        self.base_squares: Tensor  # ||W_i||^2, constant while W is frozen
        self._measured: tuple[Term, ...] = ()

    @classmethod
    def from_update(cls, update: LowRank, terms: Mapping[str, Term]) -> Magnitude:
        """Wrap `terms`, with every length as it is: T = W + U."""
        term = cls(update.in_features, update.out_features, update, device=update.A.device, dtype=update.A.dtype)
        term.wrap(terms)
        with torch.no_grad():
            term.magnitude.copy_(term.row_norms())
        term.unwrap()
        return term

    def wrap(self, terms: Mapping[str, Term]) -> None:
        super().wrap(terms)
        wrapped = tuple(terms.values())
        if wrapped != self._measured:
            squares = self.base_dense(torch.float32).detach().square().sum(1)
            self.base_squares, self._measured = squares.to(self.base_squares.device), wrapped

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """n (out,) in fp32, without building V."""
        with at_hand(self.update):
            A, B = self.update.A.float(), self.update.B.float() * self.update.scale
        with without_autocast(A):
            across = self.base(A.to(self._reference().dtype)).float()  # A W^T (r, out)
        squares = self.base_squares + 2 * (B * across.mT).sum(1) + ((B @ (A @ A.mT)) * B).sum(1)
        # cancellation may leave a row of zeros a little below zero
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        gain = self.magnitude / self.row_norms()
        y: Tensor = self.base(x) + self.update(x)
        return y * gain.to(y.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.magnitude.dtype
        V = self.base_dense(dtype) + self.update.dense(dtype)
        return V * (self.magnitude / self.row_norms()).to(dtype).unsqueeze(1)

    def lora(self) -> Lora | None:
        factors = self.update.exact_factors()
        return factors and Lora(*factors, self.magnitude.detach().float(), self.update.dropout)

    def spec(self) -> Spec:
        return super().spec() | {"update": self.update.spec()}
