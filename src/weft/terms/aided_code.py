"""AidedCode: a matrix in training to become integer codes, with a low-rank product beside it that goes away."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.errors import WeftError
from weft.kernels.straight_through import straight_through
from weft.kernels.transient_linear import Summand
from weft.linalg.svd import low_rank_factors
from weft.terms.base import Spec, Term
from weft.terms.integer_code import IntegerCode

__all__ = ["AidedCode"]


class AidedCode(Term):
    """T = Q(V) + B diag(gate) A while it is trained, Q(V) in evaluation (QVGen, Huang et al., 2025, arXiv 2505.11497):

        Q(V)[i, j] = s_i clip(round(V[i, j] / s_i), -2^(b-1), 2^(b-1) - 1)

    with a learned step s a row, rounded to the dtype that it will be stored in. V gets the gradient of T where it is
    not clipped, s that of Esser et al., 2020 (arXiv 1902.08153): round(v) - v within, the end where clipped, v = V / s,
    divided by sqrt(in (2^(b-1) - 1)). The gate (r,) is set from outside.

    Args:
        bits: b, 2 to 8.
        rank: r.
        scale_dtype: of stored steps.
    """

    kind = "aided_code"
    lean_alone = True
    gate: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, rank: int, scale_dtype: str = "float16", **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        if bits not in range(2, 9):
            raise WeftError(f"There are no integer codes of {bits} bits; give 2 to 8.")
        self.bits, self.rank, self.scale_dtype = bits, rank, scale_dtype
        self.V = nn.Parameter(torch.empty(out_features, in_features, **place))
        self.step = nn.Parameter(torch.empty(out_features, **place))
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.register_buffer("gate", torch.empty(rank, **place))

    @classmethod
    def from_matrix(cls, W: Tensor, bits: int, rank: int, scale_dtype: str = "float16") -> AidedCode:
        """V = W (out, in), s = 2 mean|W_i| / sqrt(2^(b-1) - 1), B A the best of rank r for W - Q(W), its gate open."""
        term = cls(W.shape[1], W.shape[0], bits, rank, scale_dtype, device=W.device, dtype=W.dtype)
        with torch.no_grad():
            term.V.copy_(W)
            term.step.copy_(2 * W.abs().mean(1) / (2 ** (bits - 1) - 1) ** 0.5)
            term.step.clamp_(min=torch.finfo(torch.float16).tiny)
            left = W.float() - _quantised(term.V.float(), term._steps().float(), bits)
            B, A = low_rank_factors(left, rank) if not W.is_meta else (term.B, term.A)
            term.B.copy_(B)
            term.A.copy_(A)
            term.gate.fill_(1.0)
        return term

    @classmethod
    def example(cls, generator: Generator) -> AidedCode:
        """One of 3 bits, its gate half closed."""
        term = cls.from_matrix(torch.randn(12, 8, generator=generator), 3, 3)
        term.gate[2] = 0.5
        return term

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        wide = _wide(self.V, dtype or self.V.dtype)
        T: Tensor = _Coded.apply(*(t.to(wide) for t in (self.V, self._steps())), self.bits)  # type: ignore[no-untyped-call]
        if self.training:
            T = T + (self.B.to(wide) * self.gate.to(wide)) @ self.A.to(wide)
        return T.to(dtype or self.V.dtype)

    def summand(self) -> Summand:
        gate = self.gate if self.training else torch.zeros_like(self.gate)
        add, pull = partial(_add, bits=self.bits), partial(_pull, bits=self.bits)
        return Summand(add, pull, 1.0, (self.V, self._steps(), self.B, self.A, gate), cast=False)

    def finished(self) -> IntegerCode:
        scale = self._steps().detach().to(getattr(torch, self.scale_dtype)).unsqueeze(1)
        wide = _wide(self.V, torch.float32)
        codes = _codes(self.V.detach().to(wide), scale.to(wide).squeeze(1), self.bits)
        return IntegerCode.from_codes(codes + 2 ** (self.bits - 1), scale, None, self.bits, None, self.V.dtype)

    def spec(self) -> Spec:
        return super().spec() | {"bits": self.bits, "rank": self.rank, "scale_dtype": self.scale_dtype}

    def _steps(self) -> Tensor:
        """s as it will be stored, with the gradient of the learned one; above zero."""
        stored = self.step.detach().to(getattr(torch, self.scale_dtype)).to(self.step.dtype)
        return straight_through(stored.clamp(min=torch.finfo(torch.float16).tiny), self.step)


def _wide(V: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.promote_types(V.dtype, torch.float32), dtype)


def _codes(V: Tensor, s: Tensor, bits: int) -> Tensor:
    """Signed whole numbers (out, in)."""
    return (V / s.unsqueeze(1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _quantised(V: Tensor, s: Tensor, bits: int) -> Tensor:
    return _codes(V, s, bits) * s.unsqueeze(1)


def _slopes(G: Tensor, V: Tensor, s: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The gradients of V (out, in) and s (out,) of that of Q(V)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = V / s.unsqueeze(1)
    within = (v >= low) & (v <= high)
    by_step = torch.where(within, v.round() - v, v.clamp(low, high))
    return G * within, (G * by_step).sum(1) / (V.shape[1] * high) ** 0.5


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(V: Tensor, s: Tensor, bits: int) -> Tensor:
        return _quantised(V, s, bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        V, s, ctx.bits = inputs
        ctx.save_for_backward(V, s)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        V, s = ctx.saved_tensors
        return (*_slopes(G, V, s, ctx.bits), None)


def _add(W: Tensor, scale: float, V: Tensor, s: Tensor, B: Tensor, A: Tensor, gate: Tensor, *, bits: int) -> None:
    wide = _wide(V, W.dtype)
    V, s, B, A, gate = (t.to(wide) for t in (V, s, B, A, gate))
    W.add_(_quantised(V, s, bits).addmm_(B * gate, A), alpha=scale)


def _pull(
    G: Tensor, scale: float, V: Tensor, s: Tensor, B: Tensor, A: Tensor, gate: Tensor, *, bits: int
) -> tuple[Tensor | None, ...]:
    wide = _wide(V, G.dtype)
    G, V, s, B, A, gate = (t.to(wide) for t in (G * scale, V, s, B, A, gate))
    return (*_slopes(G, V, s, bits), (G @ A.mT) * gate, ((B * gate).mT @ G), None)
