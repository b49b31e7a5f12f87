"""kfac-svd: the truncation that costs the loss least to second order, whitened on both sides (Thoma et al., ICML 2026,
openreview IjIgNPFuCt).

    D = W' - W of rank r minimises tr(D^T G D X),   X = E[x x^T],  G = E[g g^T]
    G = L_g L_g^T,  X = L_x L_x^T;   W' = L_g^-T truncate(L_g^T W L_x) L_x^-1

The loss increase of D is about 1/2 vec(D)^T F vec(D), and the Fisher block of a linear layer is close to X (x) G
(Martens and Grosse, 2015, arXiv 1503.05671): X the second moment of its inputs, G that of the loss gradient at its
outputs. So half the sum of the dropped s^2 predicts the loss, in one unit for all layers: the allocation `best` spends
one budget on them. Relatives, all of 2025 and 2026: GFWSVD (arXiv 2505.17974) fits X and G to the Fisher matrix of
whole sequences; IO-SVD (arXiv 2605.15626) takes for G the curvature of the KL divergence over the likeliest tokens.
Deviations: X and G get a ridge of 1e-4 of their mean diagonal, where the released code shrinks X by 0.1 and G by 0.3
towards it; G counts every token as it is, where the released code leaves out the first and the last eighth of a
sequence and clips each token's gradient to 0.1 to 10 times the mean; ranks by `best`, not by the paper's LEMS.
"""

from __future__ import annotations

from torch import Tensor

from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, Method, Moments, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise"]


def factorise(W: Tensor, moments: Moments, *, ridge: float = 1e-4) -> Factors:
    """Factors of W in the (G, X) norm; `ridge` is relative to each moment's mean diagonal."""
    return Factors(*principal_factors(W, C=moments["input_moment"], M=moments["output_grad_moment"], ridge=ridge))


METHOD = Method(
    name="kfac-svd",
    kind="compress",
    summary="SVD whitened by the Fisher matrix's Kronecker factors; with `best`, one budget of predicted loss.",
    paper="Thoma et al., 2026, ICML, openreview IjIgNPFuCt",
    needs=("input_moment", "output_grad_moment"),
    allocate="best",
    split=low_rank_split(factorise),
    trained=low_rank_terms,
    defaults={"ridge": 1e-4},
)
