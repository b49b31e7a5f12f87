"""lems: the calibration changes scales and nothing else; the program beats the greedy; early blocks come first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weft.allocate import Choice, LayerInfo, Shape, greedy, lems
from weft.allocate.base import Choices, spent
from weft.errors import WeftError
from weft.verbs.divergence import summed_divergence

OUT, IN = 24, 16


def layer(seed: int, depth: float = 0.0, scale: float = 1.0) -> LayerInfo:
    """A convex curve over the ranks of a 24 x 16 matrix."""
    shape = Shape(OUT, IN)
    s = torch.rand(IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(descending=True).values
    tails = [scale * float(s[r:].square().sum()) for r in range(IN + 1)]
    ranks = range(1, (shape.numel - 1) // (OUT + IN) + 1)
    choices = [Choice(r, 4 * r * (OUT + IN), tails[r]) for r in ranks]
    return LayerInfo(shape, [*choices, Choice(None, shape.nbytes)], depth=depth)


Layers = Mapping[str, LayerInfo]
models = st.lists(st.builds(layer, st.integers(0, 100), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=4).map(
    lambda infos: {f"l{i}": info for i, info in enumerate(infos)}
)


def divergence(layers: Layers, factor: Callable[[str], float]) -> Callable[[Sequence[Mapping[str, Any]]], list[float]]:
    """Measures `factor` times the predicted loss of each cut."""

    def loss(cut: Mapping[str, Any]) -> float:
        return sum(factor(n) * c.loss for n, size in cut.items() for c in layers[n].choices if c.size == size)

    return lambda cuts: [loss(cut) for cut in cuts]


def budget(layers: Layers, share: float) -> int:
    return int(share * sum(info.shape.nbytes for info in layers.values()))


def sizes(choices: Choices) -> dict[str, Any]:
    return {name: choice.size for name, choice in choices.items()}


def error(layers: Layers, choices: Mapping[str, Choice], weight: Callable[[str], float] = lambda name: 1.0) -> float:
    found = ((name, next(c for c in layers[name].choices if c.size == choice.size)) for name, choice in choices.items())
    return sum(weight(name) * choice.loss for name, choice in found)


@given(models, st.floats(0.35, 1.0), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_points_in_proportion_to_the_prediction_change_nothing(layers: Layers, share: float, size: float) -> None:
    allowed = budget(layers, share)
    found = lems.allocate(layers, allowed, divergence=divergence(layers, lambda name: size), gamma=0.0)
    # the oracle: every combination
    least = 0.3 if share >= 0.5 else 0.1
    curves = [[c for c in info.choices if c.bytes >= least * info.shape.nbytes] for info in layers.values()]
    totals = [
        sum(c.loss for c in combination)
        for combination in itertools.product(*curves)
        if sum(c.bytes for c in combination) <= allowed
    ]
    assert spent(found) <= allowed
    assert error(layers, found) == pytest.approx(min(totals), rel=1e-5, abs=1e-12)


@given(models, st.floats(0.35, 0.95), st.sampled_from([1e-6, 1e6]))
@settings(max_examples=20, deadline=None)
def test_one_factor_on_all_points_changes_nothing(layers: Layers, share: float, factor: float) -> None:
    own = {name: 1.0 + i for i, name in enumerate(layers)}
    found = [
        lems.allocate(layers, budget(layers, share), divergence=divergence(layers, lambda n, size=size: size * own[n]))  # type: ignore[misc]
        for size in (1.0, factor)
    ]
    assert sizes(found[0]) == sizes(found[1])


@given(models)
@settings(max_examples=20, deadline=None)
def test_calibrated_curves_fall_through_the_measured_point_to_zero(layers: Layers) -> None:
    curves = lems.calibrated(layers, divergence(layers, lambda name: 3.0))
    for name, info in layers.items():
        losses = [choice.loss for choice in curves[name]]
        assert losses == sorted(losses, reverse=True) and losses[-1] == 0
        point = info.within(lems.POINT * info.shape.nbytes)
        assert next(c.loss for c in curves[name] if c.size == point.size) == pytest.approx(3 * point.loss)
        assert [c.bytes for c in curves[name]] == [c.bytes for c in info.choices]


@given(models, st.floats(0.35, 1.0), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_the_program_loses_no_more_than_the_greedy(layers: Layers, share: float, seed: int) -> None:
    factors = {name: 1.0 + (seed + i) % 3 for i, name in enumerate(layers)}
    measure = divergence(layers, lambda name: factors[name])
    allowed = budget(layers, share)
    found = lems.allocate(layers, allowed, divergence=measure, gamma=0.0)
    least = 0.3 if share >= 0.5 else 0.1
    curves = {
        name: [c for c in curve if c.bytes >= least * layers[name].shape.nbytes]
        for name, curve in lems.calibrated(layers, measure).items()
    }
    by_greedy = greedy.solve(curves, allowed)
    assert by_greedy is not None and spent(found) <= allowed and spent(by_greedy) <= allowed
    weight = factors.__getitem__
    assert error(layers, found, weight) <= error(layers, by_greedy, weight) * (1 + 1e-5) + 1e-12


@given(models, st.floats(0.35, 1.0), st.floats(0.35, 1.0))
@settings(max_examples=20, deadline=None)
def test_a_larger_budget_loses_no_more(layers: Layers, a: float, b: float) -> None:
    assume((a < 0.5) == (b < 0.5))  # there the smallest share offered changes
    measure = divergence(layers, lambda name: 1.0)
    less, more = (
        lems.allocate(layers, budget(layers, share), divergence=measure, gamma=0.0) for share in sorted((a, b))
    )
    assert error(layers, more) <= error(layers, less) * (1 + 1e-5) + 1e-12


@given(st.integers(0, 100), st.floats(0.35, 0.95), st.floats(0.5, 7.0), st.floats(0.0, 3.0))
@settings(max_examples=30, deadline=None)
def test_of_equal_curves_the_earlier_gets_no_fewer_bytes(seed: int, share: float, gamma: float, alpha: float) -> None:
    layers = {name: layer(seed, depth) for name, depth in [("last", 1.0), ("first", 0.0), ("middle", 0.5)]}
    measure = divergence(layers, lambda name: 1.0)
    found = lems.allocate(layers, budget(layers, share), divergence=measure, alpha=alpha, gamma=gamma)
    assert found["first"].bytes >= found["middle"].bytes >= found["last"].bytes


def test_depth_factors_are_the_sums_of_the_paper() -> None:
    depths = [0.0, 1 / 3, 2 / 3, 1.0]
    assert list(lems.depth_factors(depths, 0.0, 5.0).values()) == pytest.approx([6, 1 + 10 / 3, 1 + 5 / 3, 1])
    h = [1 + 1 / 4 + 1 / 9 + 1 / 16, 1 / 4 + 1 / 9 + 1 / 16, 1 / 9 + 1 / 16, 1 / 16]
    expected = [1 + 2 * (value - h[3]) / (h[0] - h[3]) for value in h]
    assert list(lems.depth_factors([*depths, 1.0], 2.0, 2.0).values()) == pytest.approx(expected)
    assert lems.depth_factors([0.0], 1.0, 5.0) == {0.0: 1.0}


def test_a_matrix_that_loses_nothing_at_its_point_costs_nothing() -> None:
    thin = layer(0)
    thin = LayerInfo(thin.shape, [choice._replace(loss=0.0) for choice in thin.choices])
    layers = {"thin": thin, "full": layer(1)}
    asked: list[str] = []
    measure = divergence(layers, lambda name: 1.0)

    def watched(cuts: Sequence[Mapping[str, Any]]) -> list[float]:
        asked.extend(name for cut in cuts for name in cut)
        return measure(cuts)

    found = lems.allocate(layers, budget(layers, 0.7), divergence=watched)
    assert asked == ["full"]
    assert found["thin"] == next(c for c in thin.choices if c.bytes >= 0.3 * thin.shape.nbytes)


def test_search_takes_the_trial_that_moves_the_model_least() -> None:
    layers = {f"l{i}": layer(i, depth=i / 3) for i in range(4)}
    tried: list[dict[str, Any]] = []

    def measure(cuts: Sequence[Mapping[str, Any]]) -> list[float]:
        whole = [dict(cut) for cut in cuts if len(cut) == len(layers)]
        tried.extend(whole)
        # later layers matter most, against what the depth factor says
        return [sum((i + 1) ** 3 / ((cut.get(f"l{i}") or IN) + 1) for i in range(4) if f"l{i}" in cut) for cut in cuts]

    found = lems.allocate(layers, budget(layers, 0.5), divergence=measure, trials=10)
    assert len(tried) == 10
    given = lems.allocate(layers, budget(layers, 0.5), divergence=measure)
    values = measure(tried)
    assert tried[0] == sizes(given) and sizes(found) == tried[values.index(min(values))]
    assert min(values) < values[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_point_that_is_not_finite_is_named(value: float) -> None:
    layers = {"a": layer(0), "b": layer(1)}
    with pytest.raises(WeftError, match="With a cut to the size 1 the model's predictions are not finite; leave"):
        lems.allocate(layers, budget(layers, 0.5), divergence=lambda cuts: [value for _ in cuts])


def test_many_ranks_enter_in_multiples_of_eight() -> None:
    shape = Shape(256, 256)
    choices = [Choice(r, 4 * 512 * r, float(128 - r)) for r in range(1, 128)]
    info = LayerInfo(shape, [*choices, Choice(None, shape.nbytes)])
    found = lems.allocate({"a": info}, budget({"a": info}, 0.6), divergence=lambda cuts: [1.0 for _ in cuts])
    assert found["a"].size == 72  # 76 would fit


def test_a_divergence_of_next_to_nothing_is_not_below_zero():
    draw = torch.Generator().manual_seed(0)
    for scale in (1e-4, 1e-3, 1e-2):
        z = torch.randn(64, 512, generator=draw) * 4
        assert summed_divergence(z, z + scale * 1e-3 * torch.randn(64, 512, generator=draw)) >= 0
    assert math.isnan(summed_divergence(z, z * float("nan")))
