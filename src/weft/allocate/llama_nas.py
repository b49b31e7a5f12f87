"""llama-nas: sizes by an evolution of sub-networks that a cheap predictor of their quality guides (Sarah et al., 2024,
arXiv 2405.18377; the search is LINAS, Cummings et al., 2022).

    measure some sub-networks; then `rounds` times
        fit      ridge regression of log divergence on the one-hot sizes of all layers
        evolve   NSGA-II on (predicted divergence, bytes)
        measure  of its front the sub-networks that were not yet

Of what was measured and fits the budget, the one that moves the model's predictions least is taken. With
`--method modegpt` or `lrp-pruning` the sizes are widths of MLPs and heads, with others ranks or bits.
Deviations: the published space is the number of layers, and two widths for each MLP: blocks stay here, and each layer
or joint has four sizes. Quality is the KL to the dense model on calibration text, where the paper takes the accuracy of
a task. The weights were not trained for random sub-networks before (InstaTune). 96 measurements, where about 250 are
published. First sub-networks are drawn so that they spend the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weft.allocate.base import Allocator, Choice, Choices, LayerInfo, check_reach
from weft.allocate.search import Configuration, Divergence, Trials, draw
from weft.seeds import generator

__all__ = ["ALLOCATION", "allocate", "crowding", "fronts", "predictor"]

_SIZES = 4  # that a layer offers, besides that it stays


def allocate(
    layers: Mapping[str, LayerInfo],
    budget: int,
    *,
    divergence: Divergence,
    population: int = 32,
    rounds: int = 4,
    generations: int = 40,
    seed: int = 0,
) -> Choices:
    """The best measured sub-network within the budget.

    Args:
        divergence: (cuts, each a mapping layer -> size) -> how far the model's predictions move.
        population: of the evolution, and of the first measurements.
        rounds: of predictor, evolution and measurements, half a population each.

    Raises:
        WeftError: the smallest sizes exceed the budget; predictions that are not finite.
    """
    check_reach(layers, budget)
    trials = Trials([[{name: c} for c in _offered(layer)] for name, layer in layers.items()], divergence)
    own = generator(seed, "sub-networks")
    least = tuple(0 for _ in trials.genes)
    trials.measure([least, *(draw(trials, budget, own) for _ in range(population - 1))])
    for _ in range(rounds):
        known = list(trials.measured)
        predict = predictor(trials, known)
        front = _evolved(trials, known[-population:], predict, budget, generations, own)
        unseen = [c for c in front if c not in trials.measured]
        unseen += [draw(trials, budget, own) for _ in range(population // 2 - len(unseen))]
        trials.measure(unseen[: population // 2])
    return trials.best(budget)


def _offered(layer: LayerInfo) -> list[Choice]:
    """A few of a layer's choices, by rising bytes, the last of them included."""
    sizes = list(layer.choices)
    steps = min(_SIZES, len(sizes) - 1)
    return [sizes[i * (len(sizes) - 1) // max(steps, 1)] for i in range(steps + 1)]


def predictor(trials: Trials, known: Sequence[Configuration], ridge: float = 1e-2) -> Tensor:
    """The weights (all options + 1,) of a ridge regression of log divergence on what was measured."""
    x = _with_one(trials.features(known))
    y = torch.tensor([trials.measured[c] for c in known], dtype=torch.float64).clamp(min=1e-12).log()
    return torch.linalg.solve(x.mT @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _evolved(
    trials: Trials,
    first: Sequence[Configuration],
    weights: Tensor,
    budget: int,
    generations: int,
    own: torch.Generator,
) -> list[Configuration]:
    """The last population of NSGA-II within the budget, the best front first."""

    def points(those: Sequence[Configuration]) -> Tensor:
        quality = _with_one(trials.features(those)) @ weights
        return torch.stack([quality, torch.tensor([trials.nbytes(c) for c in those], dtype=quality.dtype)], 1)

    now = list(first)
    for _ in range(generations):
        order = _order(points(now))
        parents = [now[i] for i in order]
        children = [_child(trials, parents, own) for _ in range(len(first))]
        every = list(dict.fromkeys(c for c in [*now, *children] if trials.nbytes(c) <= budget))
        now = [every[i] for i in _order(points(every))[: len(first)]]
    return now


def _child(trials: Trials, parents: Sequence[Configuration], own: torch.Generator) -> Configuration:
    """Of two winners of tournaments, each gene from one of them; about one gene changes."""
    pairs = torch.randint(len(parents), (2, 2), generator=own).amin(1)  # parents are in order
    sides = torch.randint(2, (len(trials.genes),), generator=own).tolist()
    made = [parents[int(pairs[side])][gene] for gene, side in enumerate(sides)]
    for gene in (torch.rand(len(made), generator=own) < 1 / len(made)).nonzero().flatten().tolist():
        made[gene] = int(torch.randint(len(trials.genes[gene]), (), generator=own))
    return tuple(made)


def _order(points: Tensor) -> list[int]:
    """Rows of points (n, 2), both to be small: front after front, in a front the loneliest first."""
    order: list[int] = []
    for front in fronts(points):
        order += [front[i] for i in crowding(points[front]).sort(descending=True, stable=True).indices.tolist()]
    return order


def fronts(points: Tensor) -> list[list[int]]:
    """Rows of points (n, k) that no other of what is left is as small as in all and smaller than in one: the fronts."""
    no_worse = (points.unsqueeze(1) <= points.unsqueeze(0)).all(2)
    dominates = no_worse & ~no_worse.mT
    left, found = torch.ones(len(points), dtype=torch.bool), list[list[int]]()
    while bool(left.any()):
        free = left & ~(dominates & left.unsqueeze(1)).any(0)
        found.append(free.nonzero().flatten().tolist())
        left &= ~free
    return found


def crowding(points: Tensor) -> Tensor:
    """How far the neighbours of each row of points (n, k) are along its front; endless at the ends."""
    total = points.new_zeros(len(points))
    for values in points.unbind(1):
        order = values.argsort()
        ordered, spread = values[order], float(values.max() - values.min()) or 1.0
        gaps = torch.full_like(ordered, float("inf"))
        gaps[1:-1] = (ordered[2:] - ordered[:-2]) / spread
        total[order] += gaps
    return total


ALLOCATION = Allocator(
    name="llama-nas",
    summary="An evolution of sub-networks guided by a regression on those that were measured.",
    paper="Sarah et al., 2024, arXiv 2405.18377",
    allocate=allocate,
    reads=("divergence",),
)
