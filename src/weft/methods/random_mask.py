"""random-mask: train entries drawn at random and no others, the baseline of every method that chooses them; SHiRA with
its random mask (Bhardwaj et al., 2024, arXiv 2406.13175, section 3.2).

    W' = W + scatter(v, J);   K = min(r (in + out), in out) distinct entries J, v (K,) zero at the start

K is the budget of a LoRA of rank r, and of `lift`; `density` gives a share of the entries instead, as for `sft`.
Deviations: the entries are a sparse term beside W instead of a part of it, so that small steps survive in a bf16 base
and removal is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.methods.base import Method, Site, Split
from weft.terms import Sparse

__all__ = ["METHOD", "entry_count", "random_entries", "split"]


def entry_count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """K: r (in + out), or `density` times in out, at least 1 and at most in out."""
    size, density = out_features * in_features, options.get("density")
    wanted = rank * (out_features + in_features) if density is None else round(density * size)
    return max(1, min(wanted, size))


def random_entries(site: Site, density: float | None) -> Tensor:
    """K distinct flat positions, rising: (K,) int64."""
    size = site.shape[0] * site.shape[1]
    count = entry_count(*site.shape, site.rank, {"density": density})
    chosen = torch.empty(0, dtype=torch.int64)
    while chosen.numel() < count:  # a permutation of all entries would take minutes for a large model
        more = torch.randint(size, (2 * count,), generator=site.generator)
        chosen = torch.unique(torch.cat([chosen, more]))
    keep = torch.randperm(chosen.numel(), generator=site.generator)[:count]
    return chosen[keep].sort().values.to(site.device)


def split(site: Site, *, density: float | None) -> Split:
    """Zeros at random entries, fixed for good."""
    mask = torch.zeros(site.shape, dtype=torch.bool, device=site.device)
    mask.view(-1)[random_entries(site, density)] = True
    return Split({"": Sparse.from_mask(torch.zeros(site.shape, dtype=site.dtype, device=site.device), mask)})


METHOD = Method(
    name="random-mask",
    kind="adapt",
    summary="Entries of each weight drawn at random, trained in place: the baseline of methods that choose them.",
    paper="Bhardwaj et al., 2024, arXiv 2406.13175",
    split=split,
    count=entry_count,
    defaults={"density": None},
)
