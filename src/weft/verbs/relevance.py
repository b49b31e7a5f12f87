"""The relevance of the units of every joint, for allocations that read it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from weft.errors import WeftError
from weft.runs.pieces import Store
from weft.stats.calibrate import Batch, calibrate
from weft.stats.relevance import unit_scores
from weft.verbs.survey import Plan

__all__ = ["relevance"]


def relevance(model: nn.Module, plan: Plan, batches: Sequence[Batch], store: Store) -> dict[str, Tensor]:
    """Scores of the units of every site (groups, n); a layer in no joint has one unit.

    Raises WeftError for a method that cuts no joints.
    """
    if not plan.joints:
        raise WeftError(f"This allocation ranks units that {plan.method.name} does not cut; give allocate='uniform'.")
    readers = {name: list(joint.members.values())[-1].layer for name, joint in plan.joints.items()}
    found = calibrate(model, batches, ("input_relevance",), layers=list(readers.values()), cache=store.directory)
    scores = {name: unit_scores(plan.joints[name], found[layer]["input_relevance"]) for name, layer in readers.items()}
    one = next(iter(scores.values())).new_ones(1, 1)
    return {site: scores.get(site, one) for site in plan.sites}
