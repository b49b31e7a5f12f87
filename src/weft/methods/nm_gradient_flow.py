"""nm-gradient-flow: matrices in which in the end N of every M neighbours in a row stay, the others fading out slowly
(progressive gradient flow, Bambhaniya et al., 2024, arXiv 2402.04744; its code
abhibambhaniya/progressive_gradient_flow_nm_sparsity, read through its description).

    y = x (V * (m + beta (1 - m)))^T,   m = 1 for the N largest |V| of every M, anew in each forward pass
    decay "exponential", "linear": beta falls from 1 to 0
    decay "stepwise": beta = 0, M-1:M, M/2:M, M/4:M ... N:M;   "geometric": 8N:8M, 4N:4M, 2N:2M, N:M
    gradient "chain": through beta, so that it fades on what is pruned;  "straight": as if nothing were pruned

Pruned entries are trained as long as they have a part, and may come back. A regime for few kept entries (1:16), where
straight-through training is lost in the noise of the pruned ones. The memory of training is dense, saved is at
inference: in the end a matrix is its kept entries and one bit an entry. `weft merge` gives zeros in their places.
Deviations: every matrix of the blocks (published: those of the feed-forward layers), in rows, which is what hardware
reads. beta ends at 1e-3, whatever the run's length, where the code has a fixed rate; then one step or more are binary.
Which gradient the paper's results have is not known; the code's is "straight" everywhere.
"""

from __future__ import annotations

from weft.errors import WeftError, unknown
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.methods.trp import count
from weft.rules.gradient_flow import GradientFlow, patterns
from weft.terms import Fading, Masked
from weft.terms.fading import largest_of

__all__ = ["METHOD", "finish", "split"]


def split(site: Site, *, n: int, m: int, decay: str, gradient: str) -> Split:
    """The weight, whole, with beta = 1."""
    if not 1 <= n < m:
        raise WeftError(f"{n}:{m} is no pattern: give n from 1 and m above it, such as n=2 and m=4.")
    if gradient not in ("chain", "straight"):
        raise unknown("gradient of what is pruned", gradient, ("chain", "straight"))
    inn, widest = site.shape[1], max(group for _, group in patterns(n, m, decay))
    if inn % widest:
        raise WeftError(
            f"The pattern {n}:{m} takes groups of {widest} entries"
            f"{'' if widest == m else f' (decay {decay})'}, which do not divide the {inn} inputs of {site.name}."
        )
    W = site.weight().to(site.dtype)
    return Split({"fading": Fading.from_matrix(W, n, m, straight=gradient == "straight")})


def finish(site: Site, *, n: int, m: int) -> Split:
    """The kept entries."""
    term = next(iter(site.terms.values()))
    return Split({"masked": Masked.from_mask(term.V.detach(), largest_of(term.V, n, m))})


METHOD = Method(
    name="nm-gradient-flow",
    kind="pretrain",
    summary="N of every M entries in the end, the others fading out slowly.",
    paper="Bambhaniya et al., 2024, arXiv 2402.04744",
    split=split,
    count=count,
    ranked=False,
    rules=(GradientFlow,),
    trained=low_rank_terms,
    begins=("given", "fresh"),
    finish=finish,
    defaults={
        "n": 2, "m": 4, "decay": "exponential", "gradient": "chain", "dense": 0.0125, "settle": 0.1,
    },
)  # fmt: skip
