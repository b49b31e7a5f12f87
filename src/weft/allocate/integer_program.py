"""One option for each layer, the cheapest together within a budget: a multiple-choice knapsack, solved exactly.

    minimise sum_ij cost_ij x_ij   with x binary, sum_j x_ij = 1 for each layer i, sum_ij size_ij x_ij <= budget

Used for bits: options are formats of a code (Guo et al., 2023, arXiv 2311.12023, equation 5).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from weft.errors import WeftError

__all__ = ["choose"]


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
