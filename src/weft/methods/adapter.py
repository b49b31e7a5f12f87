"""What the adapter methods share: the scale of a LoRA, its random start, and turning an initialiser into terms.

An *initialiser* is a function (site, scale, **options) -> (B (out, r), A (r, in)), in fp32 or wider. `low_rank` makes
it the `split` of a method: added to the untouched base, or *shifted*: the start s B A is taken out of the base, so
that the function is unchanged, by keeping a frozen copy of the start (`weft.terms.Shifted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.methods.base import Site, Split
from weft.terms import LowRank, Shifted, Term

__all__ = ["SCALING", "Common", "Pair", "kaiming", "lora_count", "low_rank", "no_gradient", "scale_of"]

Pair = tuple[Tensor, Tensor]
"""B (out, r) and A (r, in)."""

SCALING: dict[str, Any] = {"alpha": None, "rslora": False, "dropout": 0.0}
"""The options of every low-rank adapter: alpha (None: the rank, so the scale is 1), alpha / sqrt(r) instead of alpha /
r, dropout on A's input.
"""


def scale_of(rank: int, *, alpha: float | None = None, rslora: bool = False) -> float:
    """alpha / r (Hu et al., 2021, section 4.1) or alpha / sqrt(r) (Kalajdzievski, 2023, arXiv 2312.03732); alpha None
    stands for the rank.
    """
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)


def kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(columns), 1/sqrt(columns)): Kaiming uniform with a = sqrt(5), drawn in fp32 on the CPU: (rows,
    columns).
    """
    bound = 1 / math.sqrt(columns)
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * bound


def lora_count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """r (in + out)."""
    return rank * (in_features + out_features)


def no_gradient(term: Term, *names: str) -> Term:
    """The term with these parameters frozen."""
    for name in names:
        term.get_parameter(name).requires_grad_(False)
    return term


def low_rank(initialise: Callable[..., Pair], *, shifted: bool = False) -> Callable[..., Split]:
    """The `split` of a method whose terms are one LowRank, started by `initialise`.

    Args:
        initialise: (site, scale, **options without those of `SCALING`) -> B, A.
        shifted: whether the start is taken out of the base.
    """

    def split(site: Site, *, alpha: float | None, rslora: bool, dropout: float = 0.0, **options: Any) -> Split:
        # of the nominal rank: where ranks are spread over layers, the scale stays the same on all of them
        scale = scale_of(site.nominal, alpha=alpha, rslora=rslora)
        B, A = (factor.to(site.device, site.dtype) for factor in initialise(site, scale, **options))
        term = LowRank.from_factors(B, A, scale=scale, dropout=dropout)
        return Split({"": Shifted.from_term(term) if shifted else term})

    return split


class Common:
    """Tensors that layers share as parameters: made with the first layer, the very same for the others.

    Args:
        tensors: by name, as they start.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors, self._made = tensors, dict[str, nn.Parameter]()

    def on(self, site: Site) -> dict[str, nn.Parameter]:
        """The parameters. Raises WeftError where the layers lie on several devices."""
        if not self._made:
            self._made = {name: nn.Parameter(t.to(site.device, site.dtype)) for name, t in self._tensors.items()}
        device = next(iter(self._made.values())).device
        if device != site.device:
            raise WeftError(
                f"The layers of this method share parameters, on {device}, and {site.name} lies on {site.device}; put "
                "the model on one device, or adapt the layers of one device with targets=."
            )
        return self._made
