"""Fits against laws that were planted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from weft.errors import WeftError
from weft.scaling import fit
from weft.scaling.fit import _best, _jacobian, _minimum, _predicted

E, A, a, B, b = 1.7, 400.0, 0.34, 420.0, 0.28
TOKENS = np.logspace(6, 9, 12)
GRID = np.array(list(itertools.product(np.logspace(7, 9.5, 5), np.logspace(8.5, 11, 5))))


def law(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return E + A / n**a + B / d**b


def test_constants_come_back_from_runs_without_noise() -> None:
    found = fit({"tokens": TOKENS}, E + B / TOKENS**b, draws=0)
    assert found.floor == pytest.approx(E, rel=1e-4) and found.exponents["tokens"] == pytest.approx(b, rel=1e-4)
    assert found.coefficients["tokens"] == pytest.approx(B, rel=1e-3)
    assert found.to_dict()["x0"] == pytest.approx(B ** (1 / b), rel=1e-3)
    both = fit({"parameters": GRID[:, 0], "tokens": GRID[:, 1]}, law(*GRID.T), draws=0)
    assert both.exponents == pytest.approx({"parameters": a, "tokens": b}, rel=1e-4)
    assert both.predict(parameters=1e9, tokens=1e10) == pytest.approx(law(1e9, 1e10), rel=1e-6)
    assert both.error < 1e-6 and abs(both.held_out) < 1e-5


def test_the_split_of_compute_is_that_of_a_search() -> None:
    found = fit({"parameters": GRID[:, 0], "tokens": GRID[:, 1]}, law(*GRID.T), draws=0)
    sizes = 1e7 * 1.002 ** np.arange(4000)
    best = sizes[law(sizes, 1e21 / 6 / sizes).argmin()]
    said = found.optimum(1e21)
    assert said["parameters"] == pytest.approx(best, rel=0.01)
    assert said["parameters"] * said["tokens"] * 6 == pytest.approx(1e21)
    assert fit({"tokens": TOKENS}, E + B / TOKENS**b, draws=0).optimum(1e21) is None


def test_units_change_only_what_they_must() -> None:
    loss = (E + B / TOKENS**b) * np.exp(0.003 * np.random.default_rng(3).standard_normal(12))
    one, other = fit({"x": TOKENS}, loss, draws=0), fit({"x": TOKENS / 1e6}, 2 * loss, draws=0)
    assert other.exponents["x"] == pytest.approx(one.exponents["x"], rel=1e-3)
    assert other.floor == pytest.approx(2 * one.floor, rel=1e-3)
    assert other.coefficients["x"] == pytest.approx(2 * one.coefficients["x"] / 1e6 ** one.exponents["x"], rel=1e-2)


def test_the_derivatives_are_finite_differences() -> None:
    X = np.log(GRID) - np.log(GRID).mean(0)
    theta = np.array([0.4, -0.8, -1.1, math.log(0.3), math.log(0.2)])
    steps = [(_predicted(theta + h, X)[0] - _predicted(theta - h, X)[0]) / 2e-6 for h in 1e-6 * np.eye(5)]
    assert np.abs(_jacobian(theta, X) - np.stack(steps, 1)).max() < 1e-8


def test_the_minimum_does_not_depend_on_the_start() -> None:
    loss = np.log(E + B / TOKENS**b) + 0.002 * np.random.default_rng(0).standard_normal(12)
    X = (np.log(TOKENS) - np.log(TOKENS).mean())[:, None]
    best, random = _best(X, loss, 1e-3), np.random.default_rng(1)
    starts = [np.array([random.uniform(-0.5, 0.5), random.uniform(-2, 0), random.uniform(-2, -0.3)]) for _ in range(10)]
    costs = np.array([_minimum(X, loss, start, 1e-3)[0] for start in starts])
    assert (costs <= _minimum(X, loss, best, 1e-3)[0] * 1.02).sum() >= 9


def test_a_planted_law_lies_within_its_interval() -> None:
    """`benchmarks/scaling_fit.py` counts it over a hundred draws."""
    inside = 0
    for draw in range(4):
        noise = 0.003 * np.random.default_rng(draw).standard_normal(12)
        found = fit({"tokens": TOKENS}, (E + B / TOKENS**b) * np.exp(noise), draws=30, seed=draw)
        for name, true in (("floor", E), ("tokens", b)):
            low, high = found.intervals[name]
            inside += low <= true <= high
            assert low <= found.floor if name == "floor" else found.exponents["tokens"] <= high
    assert inside >= 7
    again = fit({"tokens": TOKENS}, (E + B / TOKENS**b) * np.exp(noise), draws=30, seed=3)
    assert again.intervals == found.intervals


def test_what_the_runs_cannot_tell_is_said() -> None:
    short = np.logspace(8, 9, 8)
    assert "spans 1.0 decades" in fit({"tokens": short}, E + B / short**b, draws=0).cautions[0]
    assert any("No floor" in words for words in fit({"x": TOKENS}, B / TOKENS**b, draws=0).cautions)
    assert fit({"tokens": TOKENS}, E + B / TOKENS**b, draws=0).cautions == ()


@pytest.mark.parametrize(
    ("quantities", "loss", "words"),
    [
        ({"tokens": [1, 2, 3]}, [3, 2, 1], "3 runs are too few"),
        ({"tokens": [1, 2, 3, 4]}, [1, 2, 3, 4], "The loss does not fall with tokens"),
        ({"tokens": [1, 2, 3, 4]}, [4, 3, 0, 1], "Every loss must be a positive number"),
        ({"tokens": [1, 1, 2, 2]}, [4, 3, 2, 1], "tokens takes fewer than three values"),
        ({"tokens": [1, 2, 3]}, [4, 3, 2, 1], "for each run its value and the loss"),
        ({}, [1.0], "Give at least one quantity"),
    ],
)
def test_runs_that_cannot_be_fitted_are_refused(quantities, loss, words) -> None:
    with pytest.raises(WeftError, match=words):
        fit(quantities, loss)
