"""welore: one threshold on the normalised singular values of the whole model; what it factorises is fine-tuned, the
rest frozen (Jaiswal et al., 2024, arXiv 2407.11239).

init: plain SVD with B = U sqrt(s), A = sqrt(s) V. allocate: `welore`, ranks r = #{j : (s_j - s_m) / (s_1 - s_m) >= k}
for the k that meets the budget; a matrix that would not shrink stays dense. trained: the low-rank components only (the
published AdamW lr is 5e-5).
Deviations: k is bisected to a *parameter* budget, where the official code carries constants for rank reductions of
LLaMA-2; biases are kept.
"""

from __future__ import annotations

from weft.methods.base import Method, low_rank_split, low_rank_terms
from weft.methods.svd import factorise

__all__ = ["METHOD"]

METHOD = Method(
    name="welore",
    kind="compress",
    summary="Ranks by one threshold on normalised singular values; only the low-rank components are fine-tuned.",
    paper="Jaiswal et al., 2024, arXiv 2407.11239",
    allocate="welore",
    split=low_rank_split(factorise),
    trained=low_rank_terms,
)
