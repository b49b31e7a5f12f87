"""maestro: every matrix as a product of full inner width, trained into an order of components that loses its tail
(Horvath et al., 2023, arXiv 2308.14929; its code SamuelHorvath/Maestro-LoD, `linear.py` and the samplers, read).

    B = U sqrt(s), A = sqrt(s) V of the weight, m = min(out, in) components
    each step      one layer, drawn with b <= its rank, works with its first b components
    loss           + lambda sum_l sum_j ||B[:, j:]||_F + ||A[j:]||_F
    now and then   tails of an importance ||B[:, j:]||_F ||A[j:]||_F below a share of the whole go
    in the end     r (out + in) numbers where that is less than out in, else the matrix

The rank of each matrix is found while it is trained. Training begins with up to twice a matrix's numbers, so that it is
no way to save memory from the first step on: `--plan` shows the first step.
Deviations: each pair of a layer and b is drawn independently, where the code goes through all of them in random order
before one comes again; no second pass at full rank with distillation (the code's option without it). The threshold is a
share of what the cut before left, the code's is 1e-5 whatever the layer: twenty cuts take up to 1 - 0.95^20 = 64 % of a
matrix's importance by themselves; lambda is one for AdamW at 1e-3 (the code's values differ by a factor of 5000).
Components that go are set to zero and masked; memory is freed in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.linalg.svd import low_rank_factors
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.rules.ordered_dropout import OrderedDropout, SuffixLasso
from weft.terms import Dense, GatedLowRank, LowRank

__all__ = ["METHOD", "count", "finish", "split"]


def split(site: Site) -> Split:
    """All components of the weight, in falling order."""
    B, A = low_rank_factors(site.weight(), min(site.shape))
    B, A = B.to(site.dtype), A.to(site.dtype)
    return Split({"ordered": GatedLowRank.from_factors(B, A, torch.ones_like(B[0]))})


def finish(site: Site) -> Split:
    """The components that are left, or the matrix where it is smaller."""
    term = next(iter(site.terms.values()))
    rank = int(term.gate.count_nonzero())  # a sum in half precision is exact up to 256
    if rank * sum(site.shape) >= site.shape[0] * site.shape[1]:
        return Split({"dense": Dense.from_matrix(term.dense(torch.float32).detach().to(site.dtype))})
    return Split({"low_rank": LowRank.from_factors(term.B[:, :rank], term.A[:rank])})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """m (out + in)."""
    return min(out_features, in_features) * (out_features + in_features)


METHOD = Method(
    name="maestro",
    kind="pretrain",
    summary="Products of full width whose components get an order; ranks fall while they are trained.",
    paper="Horvath et al., 2023, arXiv 2308.14929",
    split=split,
    count=count,
    ranked=False,
    rules=(OrderedDropout, SuffixLasso),
    trained=low_rank_terms,
    begins=("fresh", "given"),
    finish=finish,
    defaults={"lasso": 1e-5, "threshold": 0.05, "every": None},
)
