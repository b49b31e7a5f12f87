"""monarch: every matrix of a fresh model as a product of two block-diagonal matrices with a shuffle between them (Dao
et al., 2022, arXiv 2204.00595; HazyResearch/fly).

    `blocks` N input and output blocks of rank b = min(in, out) / N^2:  min(in, out) (in + out) / N numbers
    start "weight": the nearest Monarch matrix of the drawn weight, a truncated SVD of each of its N x N blocks
    start "kaiming": each factor ~ U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), as the code draws them

N = 4 as in the code's layer: half of a square matrix's numbers. The blocks are batched products, dense and short, for
which a GPU needs no kernel of ours. Reverse sparsification, dense again for the last tenth of the steps (GPT-2; 30 %
for BERT), is two commands: `weft merge OUT -o DENSE`, then `weft finetune DENSE --method full`.
Deviations: the start is the projection of the model's own initial weight; with "kaiming" what layers put out has a
third of the variance that the fan-in rule gives a matrix. No padding: N must divide both sides and b be whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.errors import WeftError, unknown
from weft.methods.adapter import kaiming
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.terms import Monarch

__all__ = ["METHOD", "count", "inner_rank", "split"]


def inner_rank(name: str, out_features: int, in_features: int, blocks: int) -> int:
    """b = min(in, out) / N^2. Raises WeftError where it, or a block, is not whole."""
    least = min(out_features, in_features)
    if blocks < 1 or out_features % blocks or in_features % blocks or least % blocks**2:
        raise WeftError(
            f"blocks is {blocks}, which does not fit {name} ({out_features} x {in_features}): it must divide both "
            "sides, and its square the smaller one."
        )
    return least // blocks**2


def split(site: Site, *, blocks: int, start: str) -> Split:
    """The projection of the drawn weight, or two drawn factors."""
    out, inn = site.shape
    rank = inner_rank(site.name, out, inn, blocks)
    if start not in ("weight", "kaiming"):
        raise unknown("start of a Monarch matrix", start, ("weight", "kaiming"))
    if start == "weight":
        return Split({"monarch": Monarch.from_matrix(site.weight().to(site.dtype), blocks, blocks, rank)})
    term = Monarch(inn, out, blocks, blocks, rank, device=site.device, dtype=site.dtype)
    with torch.no_grad():
        for factor in term.parameters():
            drawn = kaiming(factor.shape[0] * factor.shape[1], factor.shape[2], site.generator)
            factor.copy_(drawn.view_as(factor))
    return Split({"monarch": term})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """min(in, out) (in + out) / N."""
    return min(out_features, in_features) * (out_features + in_features) // int(options["blocks"])


METHOD = Method(
    name="monarch",
    kind="pretrain",
    summary="Two block-diagonal factors with a shuffle between them in place of every matrix.",
    paper="Dao et al., 2022, arXiv 2204.00595",
    split=split,
    count=count,
    ranked=False,
    trained=low_rank_terms,
    begins=("fresh", "given"),
    defaults={"blocks": 4, "start": "weight"},
)
