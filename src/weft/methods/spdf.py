"""spdf: every matrix on a part of its entries, drawn once (sparse pre-training, dense fine-tuning; Thangarasa et al.,
2023, arXiv 2303.10464).

    W <- W * M,   M with int((1 - sparsity) out in) ones on random places of its own in every matrix, never changed

Only kept entries are stored, trained and given moments, beside one bit an entry for M: with AdamW and bf16 weights 2.6
bytes an entry at a sparsity of 0.75, where dense training takes 10. The matrix is built for the moment
(`weft.kernels.transient_linear`), so that operations are saved on hardware that skips zeros alone. The second phase is
dense, with new moments and a new schedule, and two commands: `weft merge OUT -o DENSE`, then `weft finetune DENSE
--method full` or `weft pretrain --from DENSE`; what was masked then starts at 0.
With `rescale` the kept entries are multiplied by 1 / sqrt(1 - sparsity), so that outputs of a fresh layer keep their
variance. Of a given model, which random places would ruin, the largest entries are kept (`mask` "magnitude").
Deviations: no code was found; that the mask is uniform, and `rescale` off, are the card's reading of the paper, which
begins with fresh weights; the mask of a given model is magnitude pruning's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.errors import WeftError, unknown
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.terms import Masked

__all__ = ["METHOD", "count", "split"]


def split(site: Site, *, sparsity: float, mask: str, rescale: bool) -> Split:
    """The kept entries of the weight."""
    W = site.weight()
    kept = _kept(site, sparsity)
    if mask not in ("random", "magnitude"):
        raise unknown("choice of the mask", mask, ("random", "magnitude"))
    if mask == "random":
        places = torch.randperm(W.numel(), generator=site.generator)[:kept].to(W.device)
    else:
        places = W.abs().flatten().topk(kept).indices
    size = (1 - sparsity) ** -0.5 if rescale else 1.0
    return Split({"masked": Masked.from_places((W * size).to(site.dtype), places)})


def _kept(site: Site, sparsity: float) -> int:
    out, inn = site.shape
    if not 0 <= sparsity < 1:
        raise WeftError(f"sparsity is {sparsity}: give the share of the entries that are zero, from 0 to below 1.")
    kept = int((1 - sparsity) * out * inn)
    if kept < out:
        raise WeftError(
            f"A sparsity of {sparsity} leaves {site.name} ({out} x {inn}) {kept} entries, fewer than it has rows, so "
            f"that some stay empty; give {1 - 1 / inn:.4g} or less."
        )
    return kept


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """int((1 - sparsity) out in)."""
    return int((1 - options["sparsity"]) * out_features * in_features)


METHOD = Method(
    name="spdf",
    kind="pretrain",
    summary="Every matrix on a part of its entries, drawn once; dense again for fine-tuning.",
    paper="Thangarasa et al., 2023, arXiv 2303.10464",
    split=split,
    count=count,
    ranked=False,
    trained=low_rank_terms,
    begins=("given", "fresh"),
    defaults={"sparsity": 0.75, "mask": "random", "rescale": False},
    given={"mask": "magnitude"},
)
