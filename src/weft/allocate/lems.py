"""lems: predicted curves put to the scale of measured ones, and one integer program over them (Thoma et al., 2026).

    error_l(c) = K_l * loss_l(c) / loss_l(p_l) * m(b)
    m(b) = 1 + gamma * h(b),   h(b) ~ sum_{k=b}^{N-1} (k + 1)^-alpha

with loss_l(c) the predicted loss of the choice c for the layer l, p_l its choice of a tenth of the bytes, K_l the
divergence of the model's predictions when l alone is cut to p_l, N blocks b = 0 ... N - 1, and h scaled to [0, 1]. A
prediction has the right shape but not the right size, which differs from layer to layer, and what is lost early is
amplified by the layers after. The choices of least total error within the budget are an integer program.

Source: Thoma et al., "Advancing SVD-based LLM Compression via Layer-Wise Error Model Search", ICML 2026 (openreview
IjIgNPFuCt); alpha, gamma, their ranges, the shares and the number of trials are those of the released code.
Deviations: the curve is the choices' loss in the Fisher norm, whatever the method and its representation (for kfac-svd
that is the published tail energy); the program is solved by scipy; trials are drawn uniformly; --round replaces ranks
in multiples of 8 where a layer has at most 64 choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from weft.allocate import integer_program
from weft.allocate.base import Allocator, Choice, Choices, LayerInfo, check_reach, spent
from weft.errors import WeftError
from weft.seeds import generator

__all__ = ["ALLOCATION", "SEARCHED", "allocate", "calibrated", "depth_factors"]

POINT = 0.1
"""The share of a layer's bytes at which it is measured."""

_MANY = 64
"""Choices of a layer beyond which only sizes in multiples of 8 enter the program."""

Divergence = Callable[[Sequence[Mapping[str, Any]]], Sequence[float]]


def allocate(
    layers: Mapping[str, LayerInfo],
    budget: int,
    *,
    divergence: Divergence,
    alpha: float = 0.0,
    gamma: float = 5.0,
    trials: int = 0,
) -> Choices:
    """The choices of least calibrated error within the budget.

    Args:
        divergence: (cuts, each a mapping layer -> size) -> the divergence of the model's predictions when the named
            layers are cut to these sizes and all others are as they are.
        alpha: how fast the weight of a block falls with those that follow it; 0 for evenly.
        gamma: by how much the first block's errors outweigh the last one's, which count once.
        trials: pairs of alpha in [0, 3] and gamma in [0, 7] to try on the whole model, the given pair among them; 0
            takes the given pair untried.

    Raises:
        WeftError: the smallest sizes exceed the budget; a cut whose predictions are not finite.
    """
    check_reach(layers, budget)
    curves = calibrated(layers, divergence)
    found = [_solve(layers, curves, budget, *pair) for pair in _pairs(alpha, gamma, trials)]
    if len(found) == 1:
        return found[0]
    tried = divergence([{name: choice.size for name, choice in choices.items()} for choices in found])
    return found[min(range(len(found)), key=lambda i: tried[i])]


def calibrated(layers: Mapping[str, LayerInfo], divergence: Divergence) -> dict[str, list[Choice]]:
    """The layers' curves with their losses on the scale of the measured points.

    Raises:
        WeftError: a point that is not finite.
    """
    points = {name: layer.within(POINT * layer.shape.nbytes) for name, layer in layers.items()}
    cut = {name: point for name, point in points.items() if point.size is not None and point.loss > 0}
    measured = dict(zip(cut, divergence([{name: point.size} for name, point in cut.items()]), strict=True))
    for name, value in measured.items():
        if not 0 <= value < float("inf"):
            raise WeftError(
                f"With {name} cut to the size {cut[name].size} the model's predictions are not finite; leave the layer "
                "out with a layer pattern, or load the model in a wider dtype."
            )
    scale = {name: value / cut[name].loss for name, value in measured.items()}
    return {
        name: [choice._replace(loss=choice.loss * scale.get(name, 1.0)) for choice in layer.choices]
        for name, layer in layers.items()
    }


def depth_factors(depths: Iterable[float], alpha: float, gamma: float) -> dict[float, float]:
    """m of every depth: 1 for the deepest block, 1 + gamma for the first."""
    order = sorted(set(depths))
    parts = [(k + 1) ** -alpha for k in range(len(order))]
    h = [sum(parts[b:]) for b in range(len(order))]
    spread = h[0] - h[-1] if h else 0.0
    return {depth: 1 + gamma * ((h[b] - h[-1]) / spread if spread else 0.0) for b, depth in enumerate(order)}


def _pairs(alpha: float, gamma: float, trials: int) -> list[tuple[float, float]]:
    own = generator(0, "lems", "trials")
    drawn = torch.rand(max(trials - 1, 0), 2, generator=own) * torch.tensor([3.0, 7.0])
    return [(alpha, gamma), *((a, g) for a, g in drawn.tolist())]


def _solve(
    layers: Mapping[str, LayerInfo], curves: Mapping[str, Sequence[Choice]], budget: int, alpha: float, gamma: float
) -> Choices:
    """The integer program, on the choices from 0.3 of a layer's bytes on (0.1 below a budget of half)."""
    total = sum(layer.shape.nbytes for layer in layers.values())
    least = 0.3 if budget >= 0.5 * total else 0.1
    factors = depth_factors((layer.depth for layer in layers.values()), alpha, gamma)
    weighted = {
        name: [choice._replace(loss=choice.loss * factors[layers[name].depth]) for choice in _thinned(curve)]
        for name, curve in curves.items()
    }
    high = {name: _from(curve, least * layers[name].shape.nbytes) for name, curve in weighted.items()}
    fits = spent({name: curve[0] for name, curve in high.items()}) <= budget
    return integer_program.solve(high if fits else weighted, budget)


def _thinned(curve: Sequence[Choice]) -> list[Choice]:
    """The curve, of many choices only the first and those in multiples of 8."""
    return [
        choice
        for i, choice in enumerate(curve)
        if len(curve) <= _MANY or i == 0 or not isinstance(choice.size, int) or choice.size % 8 == 0
    ]


def _from(curve: Sequence[Choice], least: float) -> list[Choice]:
    """The choices of at least so many bytes; the largest where none has."""
    return [choice for choice in curve if choice.bytes >= least] or list(curve[-1:])


ALLOCATION = Allocator(
    name="lems",
    summary="Predicted curves scaled to one measured divergence a layer, a depth factor, and an integer program.",
    paper="Thoma et al., ICML 2026, openreview IjIgNPFuCt",
    allocate=allocate,
    reads=("losses", "divergence"),
)
SEARCHED = Allocator(
    name="lems-search",
    summary="lems with its two depth parameters chosen by ten trials on the whole compressed model.",
    paper="Thoma et al., ICML 2026, openreview IjIgNPFuCt",
    allocate=partial(allocate, trials=10),
    reads=("losses", "divergence"),
)
