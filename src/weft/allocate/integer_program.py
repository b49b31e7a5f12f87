"""One option for each layer, the cheapest together within a budget: a multiple-choice knapsack, solved exactly.

    minimise sum_ij cost_ij x_ij   with x binary, sum_j x_ij = 1 for each layer i, sum_ij size_ij x_ij <= budget

Used for bits, where options are formats of a code (Guo et al., 2023, arXiv 2311.12023, equation 5), and for any curves
of choices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from weft.allocate.base import Choice, Choices
from weft.errors import WeftError

__all__ = ["choose", "solve"]


def solve(curves: Mapping[str, Sequence[Choice]], budget: int) -> Choices:
    """One choice of each curve, of least loss together; the counterpart of `weft.allocate.greedy.solve`.

    Raises:
        WeftError: as `choose`.
    """
    useful = {name: _useful(points) for name, points in curves.items()}
    width = max(len(points) for points in useful.values())
    padded = [[*points, *[points[-1]] * (width - len(points))] for points in useful.values()]
    costs, sizes = (torch.tensor([[p[i] for p in row] for row in padded], dtype=torch.float64) for i in (2, 1))
    chosen = choose(costs, sizes, budget)
    return {name: row[option] for name, row, option in zip(curves, padded, chosen, strict=True)}


def _useful(points: Sequence[Choice]) -> list[Choice]:
    """The points that lose less than every cheaper one."""
    kept: list[Choice] = []
    for point in points:
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def choose(costs: Tensor, sizes: Tensor, budget: float, *, gap: float = 1e-6, seconds: float = 60.0) -> list[int]:
    """The option of each layer.

    Args:
        costs: (layers, options), finite, at least 0; the sum is minimised.
        sizes: (layers, options), in the unit of `budget`.
        budget: of the sizes together.
        gap: relative distance to the optimum at which the solver may stop.
        seconds: after which the best choice found so far is taken.

    Raises:
        WeftError: even the smallest options together exceed the budget, or no choice was found in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    least = float(sizes.double().amin(1).sum())
    if least > budget:
        raise WeftError(
            f"The budget is {budget:g}, but the smallest options together take {least:g}; give at least that."
        )
    layers, options = costs.shape
    # numbers near 1 keep the solver's absolute tolerances meaningful
    cost = (costs.double() / costs.double().sum().clamp(min=1e-300) * costs.numel()).numpy().ravel()
    size = (sizes.double() / budget).numpy().reshape(1, -1)
    one_each = kron(csr_array(np.eye(layers)), np.ones((1, options)), format="csr")
    with _nothing_on_stdout():
        found = milp(
            cost,
            integrality=np.ones_like(cost),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, 1)],
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
    if found.x is None:
        raise WeftError(f"No choice was found within {seconds:g} seconds ({found.message}); give it more time.")
    choice: list[int] = found.x.reshape(layers, options).argmax(1).tolist()
    return choice


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """What the solver's C++ prints, in spite of its options, goes to stderr: stdout may be a JSON answer."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
