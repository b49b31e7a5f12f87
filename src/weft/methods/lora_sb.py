"""lora-sb: train only an r x r core between two frozen sides that span the first step of full fine-tuning (Ponkshe et
al., 2024, arXiv 2411.19557, section 4).

    dW = -eta sign(G) ~ U_r diag(S_r) V_r;   B = U_r, R = diag(S_r), A = V_r;   y = W x + B R A x
    r^2 trainable numbers (R)

eta = lr / warmup, the rate of the first warm-up step of Adam, whose first step is the sign of the gradient. The base is
not corrected: the model starts one approximated step away. With orthonormal sides a step on R is the best approximation
of the full step inside {B X A}, whatever the scale.
Deviations: exact SVD; gradients below `threshold` times the largest count as zero, for rounding noise has a sign too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.linalg.svd import truncated_svd
from weft.methods.adapter import no_gradient
from weft.methods.base import Method, Site, Split
from weft.terms import CoreLowRank, Term

__all__ = ["METHOD", "core_count", "frozen_sides", "split"]


def split(site: Site, *, lr: float, warmup: int, threshold: float) -> Split:
    """The truncated first step, its core trainable."""
    G = site.moments["mean_grad"].to(site.device)
    noise = G.abs() <= threshold * G.abs().amax()
    U, s, V = truncated_svd(-(lr / warmup) * torch.sign(G).masked_fill(noise, 0), site.rank)
    return Split({"": frozen_sides(site, U, torch.diag(s), V)})


def frozen_sides(site: Site, B: Tensor, R: Tensor, A: Tensor) -> Term:
    """The term B R A of which R alone is trained."""
    term = CoreLowRank.from_factors(*(factor.to(site.device, site.dtype) for factor in (B, R, A)))
    return no_gradient(term, "A", "B")


def core_count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """r^2."""
    return rank * rank


METHOD = Method(
    name="lora-sb",
    kind="adapt",
    summary="An r x r core between two frozen sides that span the first step of full fine-tuning.",
    paper="Ponkshe et al., 2024, arXiv 2411.19557",
    needs=("mean_grad",),
    split=split,
    count=core_count,
    deviates="It starts one approximated Adam step of size lr / warmup away from the base.",
    least={"warmup": 1},
    defaults={"lr": 1e-4, "warmup": 31, "threshold": 1e-6},
)
