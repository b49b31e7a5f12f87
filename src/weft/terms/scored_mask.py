"""ScoredMask: a frozen matrix, a low-rank change of it, and a mask of what stays, by scores that are learned of few
numbers (PST, Li et al., 2022, arXiv 2205.11005).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.kernels.transient_linear import Summand
from weft.terms.base import Spec, Term
from weft.terms.masked import Masked

__all__ = ["ScoredMask"]

TRAINED = ("U", "V", "A", "B", "R", "C")


class ScoredMask(Term):
    """T = m * W', W' = W + U V, m = 1 for the `kept` largest scores S, anew in every forward pass:

        S = |W'| + A B + R 1^T + 1 C^T

    W is frozen. U, V get the gradient of T where m is 1; A, B, R, C that of the mask as if it were the scores, dS =
    dT * W' (straight through), |W'| being a constant there. `kept` is set from outside.

    Args:
        kept: how many entries stay.
        change: rank of U V.
        score: rank of A B.
    """

    kind = "scored_mask"
    lean_alone = True

    def __init__(
        self, in_features: int, out_features: int, *, kept: int, change: int, score: int, **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        self.kept, self.change, self.score = kept, change, score
        self.W = nn.Parameter(torch.empty(out_features, in_features, **place))
        shapes = {"U": (out_features, change), "V": (change, in_features), "A": (out_features, score)}
        shapes |= {"B": (score, in_features), "R": (out_features, 1), "C": (1, in_features)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **place)))
        self.U: nn.Parameter
        self.V: nn.Parameter
        self.A: nn.Parameter
        self.B: nn.Parameter
        self.R: nn.Parameter
        self.C: nn.Parameter

    @classmethod
    def from_matrix(cls, W: Tensor, change: int, score: int, generator: Generator) -> ScoredMask:
        """All entries of W (out, in) kept, U and A drawn from a normal law, all else zero."""
        out, inn = W.shape
        term = cls(inn, out, kept=W.numel(), change=change, score=score, device=W.device, dtype=W.dtype)
        with torch.no_grad():
            term.W.copy_(W)
            for name in TRAINED:
                getattr(term, name).zero_()
            for drawn in (term.U, term.A):
                drawn.copy_(torch.randn(drawn.shape, generator=generator))
        term.W.requires_grad_(False)
        return term

    @classmethod
    def example(cls, generator: Generator) -> ScoredMask:
        """One with half of its entries and no number at zero."""
        term = cls.from_matrix(torch.randn(12, 8, generator=generator), 2, 3, generator)
        for name in TRAINED:
            nn.init.normal_(getattr(term, name), generator=generator)
        term.kept = 48
        return term

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        W, U, V, A, B, R, C = (t.to(dtype or t.dtype) for t in self._tensors())
        changed = W + U @ V
        scores = changed.abs().detach() + A @ B + R + C
        return changed * _largest(scores, self.kept) + (scores - scores.detach()) * changed.detach()

    def mask(self) -> Tensor:
        """(out, in) bool: what stays now."""
        W, U, V, A, B, R, C = (t.detach() for t in self._tensors())
        return _largest((W + U @ V).abs() + A @ B + R + C, self.kept)

    def summand(self) -> Summand:
        return Summand(partial(_add, kept=self.kept), partial(_pull, kept=self.kept), 1.0, self._tensors())

    def finished(self) -> Masked:
        return Masked.from_mask((self.W + self.U @ self.V).detach(), self.mask())

    def spec(self) -> Spec:
        return super().spec() | {"kept": self.kept, "change": self.change, "score": self.score}

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.W, *(getattr(self, name) for name in TRAINED))


def _largest(scores: Tensor, kept: int) -> Tensor:
    places = scores.detach().flatten().topk(kept, sorted=False).indices
    return (
        torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).index_fill_(0, places, True).view_as(scores)
    )


def _parts(tensors: tuple[Tensor, ...], kept: int) -> tuple[Tensor, Tensor]:
    """W' and the mask."""
    W, U, V, A, B, R, C = tensors
    changed = torch.addmm(W, U, V)
    return changed, _largest(torch.addmm(changed.abs(), A, B).add_(R).add_(C), kept)


def _add(T: Tensor, scale: float, *tensors: Tensor, kept: int) -> None:
    changed, mask = _parts(tensors, kept)
    T.add_(changed.mul_(mask), alpha=scale)


def _pull(G: Tensor, scale: float, *tensors: Tensor, kept: int) -> tuple[Tensor | None, ...]:
    _, U, V, A, B, _, _ = tensors
    changed, mask = _parts(tensors, kept)
    by_score, G = changed.mul_(G).mul_(scale), G * mask * scale
    scores = (by_score @ B.mT, A.mT @ by_score, by_score.sum(1, keepdim=True), by_score.sum(0, keepdim=True))
    return (G, G @ V.mT, U.mT @ G, *scores)
