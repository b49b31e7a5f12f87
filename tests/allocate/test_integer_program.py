"""The integer program against exhaustive search."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch

from weft.allocate.integer_program import choose
from weft.errors import WeftError


def problem(seed, layers=5, options=6):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.rand(layers, options, generator=g).sort(1).values + 0.5
    costs = torch.rand(layers, options, generator=g).sort(1, descending=True).values
    return costs, sizes


def spent(table, choice):
    return sum(float(table[i, j]) for i, j in enumerate(choice))


@pytest.mark.parametrize("seed", range(4))
def test_equals_exhaustive_search(seed):
    costs, sizes = problem(seed)
    budget = 0.5 * float(sizes.amin(1).sum() + sizes.amax(1).sum())
    every = itertools.product(range(6), repeat=5)
    best = min(spent(costs, c) for c in every if spent(sizes, c) <= budget)
    choice = choose(costs, sizes, budget)
    assert spent(sizes, choice) <= budget * (1 + 1e-6) and spent(costs, choice) == pytest.approx(best, rel=1e-5)


def test_a_larger_budget_never_costs_more():
    costs, sizes = problem(9)
    low, high = float(sizes.amin(1).sum()), float(sizes.amax(1).sum())
    found = [spent(costs, choose(costs, sizes, low + (high - low) * t)) for t in (0.01, 0.25, 0.5, 0.75, 1.0)]
    assert found == sorted(found, reverse=True) and found[-1] == pytest.approx(float(costs.amin(1).sum()))


def test_tiny_and_huge_numbers():
    costs, sizes = problem(3)
    budget = float(sizes.mean(1).sum())
    assert choose(costs * 1e-12, sizes * 1e9, budget * 1e9) == choose(costs, sizes, budget)


def test_a_budget_below_the_least_is_refused():
    costs, sizes = problem(0)
    with pytest.raises(WeftError, match="smallest options together take"):
        choose(costs, sizes, 0.5)


def test_what_the_solver_prints_does_not_reach_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import scipy.optimize

    solve = scipy.optimize.milp

    def talkative(*args: Any, **settings: Any) -> Any:
        os.write(1, b"HighsMipSolverData")
        return solve(*args, **settings)

    monkeypatch.setattr(scipy.optimize, "milp", talkative)
    assert choose(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]]), 2) == [1]
    print("the answer")
    assert capfd.readouterr() == ("the answer\n", "HighsMipSolverData")
