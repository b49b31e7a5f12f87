"""sora: a gate on every rank-one component, trained by proximal steps that switch components off exactly (Ding et al.,
2023, arXiv 2311.11696).

    y = W x + s B (g * (A x)),  A Kaiming, B = 0, g ~ N(0, 1);   g <- sign(g) max(|g| - xi, 0) after each step
    r (in + out + 1) trainable numbers, of which a component with g = 0 is dropped on export: kept (in + out)

xi is used as it is, not times the learning rate (`by_rate=True` for that): 3e-4 as published, more in runs of fewer
than 1284 steps (`Proximal` says how much). `xi=[...]` is the paper's schedule of thresholds (algorithm 1), each for
`every` steps or an equal share of the run; save the adapter at the end of each. `ones=True` starts the gates at 1
instead, where no component is below xi before it has learned anything. Gates are vectors, so they are not decayed.
Deviations: the exact soft threshold, where the released operator zeroes all |g| < 2 xi (`released=True` for it); the
released trainer also adds `penalty` (10 there) times the mean |g| to the loss, which shrinks gates twice: 0 here; the
learning rate schedule does not end before the last threshold, as it does there. The scale is 1 unless `alpha` is given,
published are alpha 16 at r 8. With `ones` no threshold closes a gate by itself: their sum over a run is 0.385.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.methods import lora
from weft.methods.adapter import lora_count, scale_of
from weft.methods.base import Method, Site, Split
from weft.rules.proximal import Proximal
from weft.terms import Spectral, Term
from weft.terms.adapters import find_adapter

__all__ = ["METHOD", "prune", "split"]


def split(site: Site, *, alpha: float | None, rslora: bool, dropout: float, ones: bool, **_: Any) -> Split:
    """LoRA's start with a gate between the factors."""
    scale = scale_of(site.nominal, alpha=alpha, rslora=rslora)
    B, A = lora.initialise(site, scale)
    gate = torch.ones(site.rank) if ones else torch.randn(site.rank, generator=site.generator)
    factors = (factor.to(site.device, site.dtype) for factor in (B, gate, A))
    return Split({"": Spectral.from_factors(*factors, scale=scale, dropout=dropout)})


def prune(model: nn.Module, name: str | None = None) -> dict[str, int]:
    """Cut the components whose gate is zero out of an adapter (None: the only one), for good; the function stays.

    Do it when training is over: the optimizer knows the tensors of before. A layer that has switched off everything
    keeps one closed component.

    Returns:
        layer -> components that are kept.

    Raises:
        WeftError: no such adapter, or it is not one of SoRA's.
    """
    adapter = find_adapter(model, name)
    if adapter.method != "sora":
        raise WeftError(
            f"The adapter {adapter.name!r} is one of {adapter.method!r}; only 'sora' has gates to prune by."
        )
    kept = {layer: _cut(terms[adapter.name]) for layer, terms in adapter.terms.items()}
    adapter.settings["ranks"] = {layer: max(count, 1) for layer, count in kept.items()}
    return kept


@torch.no_grad()
def _cut(term: Term) -> int:
    assert isinstance(term, Spectral)
    open_ = term.s.nonzero().flatten()
    kept = open_ if open_.numel() else torch.arange(1, device=term.s.device)
    for key, value in (("U", term.U[:, kept]), ("s", term.s[kept]), ("V", term.V[kept])):
        setattr(term, key, nn.Parameter(value.contiguous(), requires_grad=term.get_parameter(key).requires_grad))
    term.rank = kept.numel()
    return open_.numel()


def _count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    return lora_count(out_features, in_features, rank, options) + rank


METHOD = Method(
    name="sora",
    kind="adapt",
    summary="LoRA with a gate on each component, closed exactly by proximal steps: the ranks fall out.",
    paper="Ding et al., 2023, arXiv 2311.11696",
    split=split,
    count=_count,
    rules=(Proximal,),
    defaults={
        "alpha": None,
        "rslora": False,
        "dropout": 0.0,
        "xi": None,
        "every": None,
        "by_rate": False,
        "penalty": 0.0,
        "ones": False,
        "released": False,
    },
)
