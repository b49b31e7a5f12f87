"""llama-nas and quantune: searches over configurations, against enumeration of small spaces."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import weft
from weft.allocate import llama_nas, quantune
from weft.allocate.base import Choice, LayerInfo, Shape
from weft.allocate.search import Trials
from weft.methods import METHODS
from weft.testing_adapters import task, tiny_llama
from weft.verbs.compress import compress

SIZES = (2, 3, 4, 8)


def layers(count: int = 8, blocks: int = 4) -> dict[str, LayerInfo]:
    """Half of the layers of a block are attention; sizes are bits."""
    shape, found = Shape(8, 8, 2), {}
    for i in range(count):
        block = i * blocks // count
        name = f"{block}.{'attn' if i % 2 else 'mlp'}.{i}"
        options = [*(Choice(bits, 8 * bits) for bits in SIZES), Choice(None, shape.nbytes)]
        found[name] = LayerInfo(shape, options, depth=block / (blocks - 1))
    return found


class Additive:
    """A divergence that is a sum over layers, and remembers what it was asked."""

    def __init__(self, infos: Mapping[str, LayerInfo], seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.weights = dict(zip(infos, torch.rand(len(infos), generator=draw).square().tolist(), strict=True))
        self.asked: list[tuple[Any, ...]] = []

    def of(self, cut: Mapping[str, Any]) -> float:
        return sum(self.weights[name] * 4.0 ** -(16 if size is None else size) for name, size in cut.items())

    def __call__(self, cuts: Sequence[Mapping[str, Any]]) -> list[float]:
        self.asked += [tuple(cut.values()) for cut in cuts]
        return [self.of(cut) for cut in cuts]


def ranked(infos: Mapping[str, LayerInfo], genes: Sequence[Any], measure: Additive, budget: int) -> list[float]:
    """The divergences of all configurations within the budget, the best first."""
    trials = Trials(genes, measure)
    every = [c for c in itertools.product(*(range(len(g)) for g in genes)) if trials.nbytes(c) <= budget]
    return sorted(measure.of({n: choice.size for n, choice in trials.choices(c).items()}) for c in every)


@pytest.mark.parametrize("page", [llama_nas, quantune])
def test_nothing_is_measured_twice_and_the_budget_is_kept(page: Any) -> None:
    infos, budget = layers(), 8 * 8 * 4
    measure = Additive(infos, 0)
    few = {"population": 12, "rounds": 2, "generations": 8} if page is llama_nas else {}
    chosen = page.allocate(infos, budget, divergence=measure, **few)
    assert sum(choice.bytes for choice in chosen.values()) <= budget and chosen.keys() == infos.keys()
    assert len(set(measure.asked)) == len(measure.asked) <= 24
    found = measure.of({name: choice.size for name, choice in chosen.items()})
    assert found == min(measure.of(dict(zip(infos, asked, strict=True))) for asked in measure.asked)
    again = page.allocate(infos, budget, divergence=Additive(infos, 0), **few)
    assert again == chosen, "the same seed gives the same answer"


def test_evolution_finds_the_best_of_a_small_space() -> None:
    """5^4 sub-networks, an additive log is not what the predictor is told: within the best twentieth of them."""
    infos = layers(4, 4)
    for seed in range(2):
        measure = Additive(infos, seed)
        few = {"population": 20, "rounds": 4, "generations": 15}
        chosen = llama_nas.allocate(infos, 4 * 8 * 4, divergence=measure, seed=seed, **few)
        genes = [[{name: c} for c in info.choices] for name, info in infos.items()]
        best = ranked(infos, genes, measure, 4 * 8 * 4)
        assert measure.of({n: c.size for n, c in chosen.items()}) <= best[len(best) // 20]


def test_stumps_find_the_top_in_few_trials() -> None:
    """The top twentieth of all configurations in 20 measurements, in nine of ten draws."""
    infos, budget, good = layers(16, 4), 16 * 8 * 5, 0
    for seed in range(10):
        measure = Additive(infos, seed)
        chosen = quantune.allocate(infos, budget, divergence=measure, trials=20, seed=seed)
        best = ranked(infos, quantune.groups(infos), measure, budget)
        good += measure.of({n: c.size for n, c in chosen.items()}) <= best[len(best) // 20]
    assert good >= 9


def test_fronts_and_crowding_are_those_of_a_loop() -> None:
    points = torch.randint(12, (60, 2), generator=torch.Generator().manual_seed(0)).double()
    rows = points.tolist()
    left, expected = list(range(60)), []
    while left:
        front = [
            i
            for i in left
            if not any(rows[j][0] <= rows[i][0] and rows[j][1] <= rows[i][1] and rows[j] != rows[i] for j in left)
        ]
        expected.append(front)
        left = [i for i in left if i not in front]
    assert llama_nas.fronts(points) == expected
    line = torch.tensor([[0.0, 8.0], [1.0, 4.0], [4.0, 2.0], [8.0, 0.0]])
    assert llama_nas.crowding(line).tolist()[1:3] == [4 / 8 + 6 / 8, 7 / 8 + 4 / 8]
    assert llama_nas.crowding(line)[0] == float("inf")


def test_stumps_are_an_additive_model() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(2, (200, 5), generator=draw).double()
    y = x @ torch.tensor([3.0, -2.0, 0.5, 0.0, 1.0]).double() + 4
    new = torch.randint(2, (20, 5), generator=draw).double()
    predicted = quantune.boosted(x, y, new)
    torch.testing.assert_close(
        predicted, new @ torch.tensor([3.0, -2.0, 0.5, 0.0, 1.0]).double() + 4, atol=0.05, rtol=0
    )
    constant = quantune.boosted(x[:1], y[:1], new)
    assert torch.equal(constant, y[:1].expand(20))


def test_groups_are_the_ends_and_two_sorts_between() -> None:
    found = quantune.groups(layers(8, 4))
    assert [sorted(group[0]) for group in found] == [
        ["0.attn.1", "0.mlp.0"], ["3.attn.7", "3.mlp.6"], ["1.attn.3", "2.attn.5"], ["1.mlp.2", "2.mlp.4"],
    ]  # fmt: skip
    assert [next(iter(option.values())).size for option in found[0]] == [2, 3, 4, 8, None]
    other = layers(2, 2)
    odd = {**other, "0.b": LayerInfo(Shape(8, 8, 2), [Choice(5, 40)], depth=0.0)}
    least = quantune.groups(odd)[0][0]
    assert [choice.size for choice in least.values()] == [2, 5], "none in common: the smallest of each"


@pytest.mark.parametrize("page", [llama_nas, quantune])
def test_on_a_model_it_keeps_the_budget(page: Any) -> None:
    few = {"population": 4, "rounds": 1, "generations": 2} if page is llama_nas else {"trials": 4, "first": 2}
    weft.register(replace(page.ALLOCATION, name="few-trials", allocate=partial(page.allocate, **few)))
    model = tiny_llama()
    done = compress(model, METHODS["rtn"], budget="9 bits", allocate="few-trials", batches=task()).allocation
    assert done.spent <= done.allowed
