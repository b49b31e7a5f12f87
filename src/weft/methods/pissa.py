"""pissa: start the factors on the r largest singular triplets and freeze the rest (Meng et al., 2024, arXiv 2404.02948,
equations 2 to 4).

    W = U S V;   B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r;   W + s (B A - B0 A0)
    r (in + out) trainable numbers

Deviations: exact SVD (the paper's fast variant is not reproducible on reload); the residual W - s B0 A0 is kept as an
exact sum, not rounded into the base's dtype.
"""

from __future__ import annotations

from weft.linalg.svd import truncated_svd
from weft.methods.adapter import SCALING, Pair, lora_count, low_rank
from weft.methods.base import Method, Site

__all__ = ["METHOD", "initialise"]


def initialise(site: Site, scale: float) -> Pair:
    """The principal triplets, their singular values shared evenly between the factors."""
    U, s, V = truncated_svd(site.weight(), site.rank)
    root = (s / scale).sqrt()
    return U * root, root.unsqueeze(1) * V


METHOD = Method(
    name="pissa",
    kind="adapt",
    summary="LoRA started on the principal singular triplets of the weight, which leave the frozen base.",
    paper="Meng et al., 2024, arXiv 2404.02948",
    split=low_rank(initialise, shifted=True),
    count=lora_count,
    defaults=SCALING,
)
