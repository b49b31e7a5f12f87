"""best: the ranks of least predicted loss within the budget.

For every layer, `losses[r]` is what keeping r components of *this method's* factors costs in the Kronecker-factored
Fisher norm, tr(D^T G D X): one unit for all layers (see `weft.methods.kfac_svd`). Minimising their sum under a
parameter budget is a separable problem. On each layer's lower convex hull of (parameters, loss), whose last point is
the dense matrix at loss 0, the greedy by steepest gain per parameter is exact up to one step; where that step is large,
uniform ranks may lose less, and are taken.

Ranking the singular directions of all layers by a loss in one unit under one budget is IO-SVD's idea too (Abbasi et
al., 2026, arXiv 2605.15626: first-order estimates of the loss, components pruned one by one) and LEMS's (Thoma et al.,
ICML 2026, openreview IjIgNPFuCt: the tail's energy calibrated by one measured point a layer and a depth factor, solved
as an integer program); the greedy on hulls is bit allocation's (Shoham and Gersho, 1988). That factors stop to pay
where a matrix may stay dense is discussed by ARA (arXiv 2510.19389); here the dense matrix is a point of every curve.
Deviations: second-order predictions of the truncation itself, where IO-SVD estimates to first order and LEMS measures;
a floor of 15 % of the uniform rank, which neither has.
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.allocate import greedy, uniform
from weft.allocate.base import Allocator, Choice, Choices, LayerInfo, check_reach

__all__ = ["ALLOCATION", "allocate", "predicted_loss"]


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, floor: float = 0.15) -> Choices:
    """Greedy on the hulls, from a floor of `floor` times each matrix's uniform share; or uniform, if that loses less.

    Raises:
        WeftError: the smallest sizes already exceed the budget.
    """
    check_reach(layers, budget)
    share = budget / sum(layer.shape.nbytes for layer in layers.values())
    found = greedy.solve({name: _from(layer, floor * share) for name, layer in layers.items()}, budget)
    if found is None:
        found = greedy.solve({name: layer.choices for name, layer in layers.items()}, budget)
    assert found is not None
    return min(found, uniform.allocate(layers, budget), key=predicted_loss)


def predicted_loss(choices: Mapping[str, Choice]) -> float:
    """What the choices lose together."""
    return sum(choice.loss for choice in choices.values())


def _from(layer: LayerInfo, share: float) -> list[Choice]:
    """The layer's choices from a share of its bytes on."""
    least = layer.within(share * layer.shape.nbytes)
    return [choice for choice in layer.choices if choice.bytes >= least.bytes]


ALLOCATION = Allocator(
    name="best",
    summary="Least predicted loss in the Fisher norm: greedy on the convex hull of each layer's curve.",
    paper="close to IO-SVD's and LEMS' allocations (2026); the greedy on hulls: Shoham and Gersho, 1988",
    allocate=allocate,
    reads=("losses",),
)
