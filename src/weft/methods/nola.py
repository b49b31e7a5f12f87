"""nola: each LoRA factor is a learned combination of k frozen random matrices that are recomputed from a seed
(Koohpayegani et al., 2023, arXiv 2310.02556, equation 2).

    A = A_0 + sum_i c_i P_i,  B = sum_j d_j Q_j;   y = W x + s B A x;   2 k trainable numbers (c, d) for any rank
    P_i, Q_j uniform in [-1, 1] / sqrt(k);  A_0 as LoRA's A;  c = d = 0 at the start

The start and the 1 / sqrt(k) are those of the authors' language-model code. Saved are c, d, the seed and four check
numbers.
Deviations: alpha defaults to the rank (their GPT-2 runs: 8 at r 8; LLaMA-2: 4 at r 16); the random numbers are counted,
not drawn by a generator, so that a GPU computes those of a CPU, and P and Q have 8 bits each; A_0 too is recomputed,
where the authors' LLaMA code saves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.methods.adapter import scale_of
from weft.methods.base import Method, Site, Split
from weft.terms import RandomCombination

__all__ = ["METHOD", "seed_of", "split"]


def split(site: Site, *, num_basis: int, alpha: float | None, dropout: float) -> Split:
    """Coefficients of zero: B is 0, and A_0 is not, so d moves first."""
    if num_basis < 1:
        raise WeftError(f"NOLA combines at least one random matrix a factor; num_basis={num_basis} is none.")
    out_features, in_features = site.shape
    term = RandomCombination(
        in_features,
        out_features,
        site.rank,
        num_basis,
        seed_of(site.generator),
        scale=scale_of(site.nominal, alpha=alpha),
        dropout=dropout,
        device=site.device,
        dtype=site.dtype,
    )
    nn.init.zeros_(term.c)
    nn.init.zeros_(term.d)
    return Split({"": term})


def seed_of(generator: torch.Generator) -> int:
    """A seed of 62 bits for numbers that are recomputed."""
    return int(torch.randint(1 << 62, (), generator=generator))


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return 2 * int(options["num_basis"])


METHOD = Method(
    name="nola",
    kind="adapt",
    summary="LoRA factors as learned combinations of random matrices recomputed from a seed: 2k numbers a layer.",
    paper="Koohpayegani et al., 2023, arXiv 2310.02556",
    split=split,
    count=_count,
    defaults={"num_basis": 512, "alpha": None, "dropout": 0.0},
)
