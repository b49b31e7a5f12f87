"""SpectralPenalty: keeps the factors of U diag(s) V small in s and near orthonormal in U and V (KaSA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.rules.base import Rule
from weft.rules.sharded import whole
from weft.terms import Spectral
from weft.terms.adapters import find_adapter

__all__ = ["SpectralPenalty", "distance_from_orthonormal"]


class SpectralPenalty(Rule):
    """Adds size * sum s^2 + orthogonality * (||U^T U - I||_F + ||V V^T - I||_F), summed over an adapter's trained
    Spectral terms, to the loss (Wang et al., 2024, arXiv 2412.06071, equations 9 to 11).

    Args:
        adapter: its name.
        size: weight of the singular values' squares (beta).
        orthogonality: weight of the distances (gamma), on the r x r side.
    """

    def __init__(self, adapter: str, *, size: float, orthogonality: float) -> None:
        self.adapter, self.size, self.orthogonality = adapter, size, orthogonality

    def penalty(self, model: nn.Module) -> Tensor | None:
        modules = [m for term in find_adapter(model, self.adapter).all_terms() for m in term.modules()]
        parts = [self._of(m) for m in modules if isinstance(m, Spectral) and m.s.requires_grad]
        return torch.stack(parts).sum() if parts else None

    def _of(self, term: Spectral) -> Tensor:
        U, s, V = (whole(p).float() for p in (term.U, term.s, term.V))
        distances = distance_from_orthonormal(U.mT) + distance_from_orthonormal(V)
        return self.size * s.square().sum() + self.orthogonality * distances


def distance_from_orthonormal(V: Tensor) -> Tensor:
    """||V V^T - I||_F for V (r, n)."""
    return torch.linalg.matrix_norm(V @ V.mT - torch.eye(len(V), device=V.device, dtype=V.dtype))
