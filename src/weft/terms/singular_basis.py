"""SingularBasis: T changes a matrix U diag(s) V within its own singular vectors: its leading values by a scale and a
shift, the square block of the others by a low-rank product (SALT).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.tensors import owned
from weft.terms.base import Factors, Spec, Term

__all__ = ["SingularBasis"]


class SingularBasis(Term):
    """T = U (f(blockdiag(diag(scale * s_1 + shift), diag(s_2) + X Y)) - diag(s)) V (Elsayed et al., 2025, arXiv
    2503.16055).

    U (out, k) and V (k, in) are the singular vectors of the matrix that T changes, s (k,) its values: s_1 the first
    `head` of them, s_2 the others. f is the identity, or the ReLU of every entry.

    Args:
        size: k.
        head: how many of the leading values have a scale and a shift of their own.
        rank: of X (k - head, rank) and Y (rank, k - head).
        relu: whether f is the ReLU; the square block is then built at each call, else skinny products do.
    """

    kind = "singular_basis"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        head: int,
        rank: int,
        *,
        relu: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.size, self.head, self.rank, self.relu = size, head, rank, relu

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.U, self.s, self.V = empty(out_features, size), empty(size), empty(size, in_features)
        self.scale, self.shift = empty(head), empty(head)
        self.X, self.Y = empty(size - head, rank), empty(rank, size - head)

    @classmethod
    def from_factors(
        cls, U: Tensor, s: Tensor, V: Tensor, X: Tensor, Y: Tensor, *, relu: bool = False
    ) -> SingularBasis:
        """The term of given sides and block X (k - head, r), Y (r, k - head), with scale 1 and shift 0."""
        size, (tail, rank) = len(s), X.shape
        term = cls(V.shape[1], len(U), size, size - tail, rank, relu=relu, device="meta", dtype=U.dtype)
        head = size - tail
        ones, zeros = (
            torch.ones(head, device=U.device, dtype=U.dtype),
            torch.zeros(head, device=U.device, dtype=U.dtype),
        )
        tensors = {"U": U, "s": s, "V": V, "scale": ones, "shift": zeros, "X": X, "Y": Y}
        for name, tensor in tensors.items():
            setattr(term, name, nn.Parameter(owned(tensor.detach())))
        return term

    def gain(self, dtype: torch.dtype | None = None) -> Tensor:
        """The change of the leading values (head,); exactly zero where the scale is 1 and the shift 0."""
        s, scale, shift = (t.to(dtype or t.dtype) for t in (self.s[: self.head], self.scale, self.shift))
        return (scale * s + shift).relu() - s if self.relu else (scale - 1) * s + shift

    def block(self, dtype: torch.dtype | None = None) -> Tensor:
        """The change of the square block (k - head, k - head)."""
        s, X, Y = (t.to(dtype or t.dtype) for t in (self.s[self.head :], self.X, self.Y))
        return (torch.diag(s) + X @ Y).relu() - torch.diag(s) if self.relu else X @ Y

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.V.to(x.dtype))
        head, tail = hidden[..., : self.head], hidden[..., self.head :]
        head = head * self.gain().to(hidden.dtype)
        if self.relu:
            tail = F.linear(tail, self.block().to(tail.dtype))
        else:
            tail = F.linear(F.linear(tail, self.Y.to(tail.dtype)), self.X.to(tail.dtype))
        return F.linear(torch.cat([head, tail.to(head.dtype)], dim=-1), self.U.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.U.dtype
        change = torch.block_diag(torch.diag(self.gain(dtype)), self.block(dtype))  # type: ignore[no-untyped-call]
        return self.U.to(dtype) @ change @ self.V.to(dtype)

    def exact_factors(self) -> Factors | None:
        if self.relu:
            return None
        U, gain, V, X, Y = (t.detach().float() for t in (self.U, self.gain(), self.V, self.X, self.Y))
        head = self.head
        return torch.cat([U[:, :head] * gain, U[:, head:] @ X], dim=1), torch.cat([V[:head], Y @ V[head:]])

    def spec(self) -> Spec:
        return super().spec() | {"size": self.size, "head": self.head, "rank": self.rank, "relu": self.relu}
