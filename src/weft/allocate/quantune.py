"""quantune: one configuration for the whole model, found by a learned model of what configurations cost in quality (Lee
et al., 2022, arXiv 2202.05048).

    measure a few configurations; then, until `trials` are measured
        fit      boosted stumps: log divergence by the options of what was measured
        measure  the best predicted of what was not yet; one in five at random

A configuration is an option for each of four groups: the first block, the last one, and of those between the attention
and the rest. Options are the sizes that all layers of a group have in common, and the smallest of each; with `--method
auto` these are methods with their groups, widths and ranks, with `rtn` widths. All that fit the budget compete, up to
4096 drawn of them. Taken is what moves the model's predictions least.
Deviations: options of the published menu (calibration size, clipping, granularity) are what a method's candidates say
here. Trees are stumps, since a few dozen points overfit deeper ones: no package of boosted trees is needed. No records
of other models start it warm. The measure is the KL to the dense model, where the paper takes the accuracy, and stops
at a loss of it that is small enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weft.allocate.base import Allocator, Choices, LayerInfo, check_reach, spent
from weft.allocate.search import Configuration, Divergence, Trials, draw
from weft.seeds import generator

__all__ = ["ALLOCATION", "allocate", "boosted", "groups"]

_MOST = 4096
_AT_RANDOM = 5  # one in so many trials is drawn


def allocate(
    layers: Mapping[str, LayerInfo],
    budget: int,
    *,
    divergence: Divergence,
    trials: int = 24,
    first: int = 6,
    seed: int = 0,
) -> Choices:
    """The best measured configuration within the budget.

    Args:
        divergence: (cuts, each a mapping layer -> size) -> how far the model's predictions move.
        trials: configurations that are measured, `first` of them drawn.

    Raises:
        WeftError: the smallest sizes exceed the budget; predictions that are not finite.
    """
    check_reach(layers, budget)
    found = Trials(groups(layers), divergence)
    own = generator(seed, "configurations")
    every = _within(found, budget, own)
    order = [every[i] for i in torch.randperm(len(every), generator=own).tolist()]
    found.measure(order[:first])
    while len(found.measured) < min(trials, len(every)):
        unseen = [c for c in order if c not in found.measured]
        if len(found.measured) % _AT_RANDOM:
            known = list(found.measured)
            y = torch.tensor([found.measured[c] for c in known], dtype=torch.float64).clamp(min=1e-12).log()
            unseen.sort(key=dict(zip(unseen, _predicted(found, known, y, unseen), strict=True)).__getitem__)
        found.measure(unseen[:1])
    return found.best(budget)


def groups(layers: Mapping[str, LayerInfo]) -> list[list[Choices]]:
    """Of each group of layers that there is, the options: choices of one size for all of them."""
    depths = {layer.depth for layer in layers.values()}

    def group(name: str) -> int:
        depth = layers[name].depth
        return 0 if depth == min(depths) else 1 if depth == max(depths) else 2 if "att" in name.lower() else 3

    names = [[name for name in layers if group(name) == i] for i in range(4)]
    return [_options({name: layers[name] for name in own}) for own in names if own]


def _options(layers: Mapping[str, LayerInfo]) -> list[Choices]:
    """Choices of a size that all of these layers offer, and the smallest of each, by rising bytes."""
    by_size = [{str(choice.size): choice for choice in layer.choices} for layer in layers.values()]
    common = [size for size in by_size[0] if all(size in other for other in by_size)]
    options = [dict(zip(layers, (own[size] for own in by_size), strict=True)) for size in common]
    least = {name: layer.choices[0] for name, layer in layers.items()}
    options += [] if least in options else [least]
    return sorted(options, key=spent)


def _within(found: Trials, budget: int, own: torch.Generator) -> list[Configuration]:
    """Every configuration that fits, or many of them."""
    counts = [range(len(options)) for options in found.genes]
    if math.prod(map(len, counts)) > _MOST:
        return list(dict.fromkeys(draw(found, budget, own) for _ in range(_MOST)))
    return [c for c in itertools.product(*counts) if found.nbytes(c) <= budget]


def _predicted(
    found: Trials, known: Sequence[Configuration], y: Tensor, unseen: Sequence[Configuration]
) -> list[float]:
    return boosted(found.features(known), y, found.features(unseen)).tolist()


def boosted(x: Tensor, y: Tensor, asked: Tensor, rounds: int = 60, rate: float = 0.3) -> Tensor:
    """What gradient-boosted stumps on binary features x (n, f) with values y (n,) predict at `asked` (m, f)."""
    predicted, answer = y.mean().expand(len(y)).clone(), y.mean().expand(len(asked)).clone()
    counts = x.sum(0)
    split = (counts > 0) & (counts < len(y))
    if not bool(split.any()):
        return answer
    x, asked, counts = x[:, split], asked[:, split], counts[split]
    for _ in range(rounds):
        left = y - predicted
        ones, zeros = left @ x / counts, left @ (1 - x) / (len(y) - counts)
        best = int((counts * ones.square() + (len(y) - counts) * zeros.square()).argmax())
        predicted += rate * torch.where(x[:, best] > 0, ones[best], zeros[best])
        answer += rate * torch.where(asked[:, best] > 0, ones[best], zeros[best])
    return answer


ALLOCATION = Allocator(
    name="quantune",
    summary="One configuration for a few groups of layers, by boosted stumps on those that were measured.",
    paper="Lee et al., 2022, arXiv 2202.05048",
    allocate=allocate,
    reads=("divergence",),
)
