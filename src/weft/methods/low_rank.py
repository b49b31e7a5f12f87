"""low-rank: every matrix of a fresh model as B A of rank r, trained from scratch: the floor that structured
pre-training is compared with (Khodak et al., 2021, arXiv 2105.01029; the factors of the benchmark of arXiv 2505.22922).

    B (out, r), A (r, in) ~ U(-a, a),   a^2 = 3 std / sqrt(r);   each entry of B A has the standard deviation std

`std` is the dense matrix's (the model's `initializer_range`). r (in + out) numbers a matrix.
Deviations: none of its own; the benchmark draws both factors Kaiming-uniform and leaves the product's scale to them.
"""

from __future__ import annotations

import torch

from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split, low_rank_terms, one_stream
from weft.terms import LowRank

__all__ = ["METHOD", "split"]


def split(site: Site, *, std: float) -> Split:
    """Two random factors; nothing is read of the weight."""
    out, inn = site.shape
    B, A = torch.empty(out, site.rank), torch.empty(site.rank, inn)
    for factor in (B, A):
        factor.uniform_(-1.0, 1.0, generator=site.shared)
    # the product of two such entries has variance 1/9
    size = std / (site.rank**0.5 / 3.0)
    B, A = ((factor * size**0.5).to(site.device, site.dtype) for factor in (B, A))
    return Split({"low_rank": LowRank.from_factors(B, A)})


METHOD = Method(
    name="low-rank",
    kind="pretrain",
    summary="Factors in place of every matrix, trained from scratch.",
    paper="Khodak et al., 2021, arXiv 2105.01029",
    split=split,
    share=one_stream,
    count=lora_count,
    trained=low_rank_terms,
    defaults={"std": 0.02},
)
