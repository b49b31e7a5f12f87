"""SpectralPenalty: keeps the factors of U diag(s) V small in s and near orthonormal in U and V (KaSA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.rules.base import Rule
from weft.rules.sharded import whole
from weft.terms import Spectral

__all__ = ["SpectralPenalty", "distance_from_orthonormal"]


class SpectralPenalty(Rule):
    """Adds size * sum s^2 + orthogonality * (||U^T U - I||_F + ||V V^T - I||_F), summed over trained Spectral
    terms, to the loss (Wang et al., 2024, arXiv 2412.06071, equations 9 to 11).

    Args:
        size: weight of the singular values' squares (beta).
        orthogonality: weight of the distances (gamma), on the r x r side.
    """

    works_on = (Spectral,)

    def __init__(self, size: float, orthogonality: float) -> None:
        self.size, self.orthogonality = size, orthogonality

    def begin(self, model: nn.Module) -> None:
        self.factors = [term for _, term in self.found(Spectral) if term.s.requires_grad]

    def penalty(self, model: nn.Module) -> Tensor | None:
        return torch.stack([self._of(term) for term in self.factors]).sum()

    def _of(self, term: Spectral) -> Tensor:
        U, s, V = (whole(p).float() for p in (term.U, term.s, term.V))
        distances = distance_from_orthonormal(U.mT) + distance_from_orthonormal(V)
        return self.size * s.square().sum() + self.orthogonality * distances


def distance_from_orthonormal(V: Tensor) -> Tensor:
    """||V V^T - I||_F for V (r, n)."""
    return torch.linalg.matrix_norm(V @ V.mT - torch.eye(len(V), device=V.device, dtype=V.dtype))
