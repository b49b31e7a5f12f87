"""paca: train r input columns of each weight, drawn at random, and keep only their r channels of the input (Woo et al.,
2025, arXiv 2503.01905, section 3).

    W'[:, J] = W[:, J] + (alpha / r) B,  B (out, r) zero at the start;   r out trainable numbers
    dL/dB = (alpha / r) g^T x[:, J]: the gradient of W itself on those columns

Layers that share their input (q, k and v; gate and up) have the same J. The published runs use r = 16 and alpha = 64,
a scale of 4, which multiplies the learning rate.
Deviations: what is stored is the change of the columns and J, where the authors write the columns themselves over W:
it can be put aside, removed, and merged into any copy of the base, small steps survive in a bf16 base, and on a
quantised base (QPaCA) the columns start from their quantised values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.methods.adapter import scale_of
from weft.methods.base import Method, Site, Split
from weft.seeds import generator as own_generator
from weft.terms import Columns

__all__ = ["METHOD", "share", "split"]


def share(
    shapes: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """layer -> a permutation of its input columns; one for all layers of one parent module and one input size."""
    seed = generator.initial_seed()
    return {name: _permutation(seed, name.rpartition(".")[0], columns) for name, (_, columns) in shapes.items()}


def _permutation(seed: int, parent: str, columns: int) -> Tensor:
    return torch.randperm(columns, generator=own_generator(seed, parent, str(columns)))


def split(site: Site, *, alpha: float | None) -> Split:
    """The first r columns of the layer's permutation, their change zero."""
    columns = site.shared[site.name][: site.rank].to(site.device)
    B = torch.zeros(site.shape[0], site.rank, device=site.device, dtype=site.dtype)
    scale = scale_of(site.nominal, alpha=alpha)
    return Split({"": Columns.from_columns(B, columns, site.shape[1], scale=scale)})


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return rank * out_features


def _columns(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    return in_features


METHOD = Method(
    name="paca",
    kind="adapt",
    summary="Random input columns of each weight trained in place; the backward pass keeps only their input channels.",
    paper="Woo et al., 2025, arXiv 2503.01905",
    split=split,
    share=share,
    count=_count,
    limit=_columns,
    defaults={"alpha": None},
)
