"""cola: every matrix of a fresh model as two factors with a nonlinearity between them (CoLA, Liu et al., 2025, arXiv
2502.10940; the layer of its code alvin-zyl/CoLA was read).

    y = B act(A x),   B (out, r), A (r, in) ~ N(0, s^2),   s^2 = 1 / sqrt(r (in + out)):  entries of B A have variance
    1 / (in + out)

What layers put out is close to low rank in trained models, and a nonlinearity in the r-wide middle lets a layer be
more than a matrix of that rank. It is then none: the model can be neither merged nor exported as a dense one. r (in +
out) numbers a matrix.
Deviations: the block's own nonlinearity stays beside those in the layers; no CoLA-M checkpointing (`checkpointing`
does it for whole blocks).
"""

from __future__ import annotations

import torch

from weft.methods.adapter import lora_count
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.terms import ActivatedLowRank

__all__ = ["METHOD", "split"]


def split(site: Site, *, activation: str) -> Split:
    """Two normal factors; nothing is read of the weight."""
    out, inn = site.shape
    size = (site.rank * (out + inn)) ** -0.25
    shapes = ((out, site.rank), (site.rank, inn))
    B, A = ((torch.randn(*s, generator=site.generator) * size).to(site.device, site.dtype) for s in shapes)
    return Split({"low_rank": ActivatedLowRank.from_factors(B, A, activation)})


METHOD = Method(
    name="cola",
    kind="pretrain",
    summary="Factors with a nonlinearity between them in place of every matrix.",
    paper="Liu et al., 2025, arXiv 2502.10940",
    split=split,
    count=lora_count,
    trained=low_rank_terms,
    defaults={"activation": "silu"},
)
