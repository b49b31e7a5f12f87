"""How a chain of methods spends one budget: what is decided before a survey, what after it, and what all came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from weft.allocate import ALLOCATIONS, Choice, LayerInfo
from weft.runs.pieces import Store
from weft.stats.calibrate import Batch, Stats
from weft.stats.reached import reached
from weft.terms.joints import layers_of
from weft.verbs.divergence import divergence
from weft.verbs.influence import influence
from weft.verbs.placing import measure
from weft.verbs.relevance import relevance
from weft.verbs.survey import BEFORE, Plan, survey

__all__ = ["chooser", "decide", "joined", "least", "leave_unreached"]

TRIES: dict[str, Callable[..., Any]] = {
    "measure": measure,
    "divergence": divergence,
    "influence": influence,
    "relevance": relevance,
}
"""What allocations may learn of the model, by the name that they read it under."""


def chooser(infos: Sequence[Mapping[str, LayerInfo]]) -> int:
    """The stage of a chain whose sizes the budget is spent on: the one that has several, or the last."""
    several = [i for i, info in enumerate(infos) if any(len(layer.sizes) > 1 for layer in info.values())]
    return several[0] if several else len(infos) - 1


def least(info: LayerInfo) -> Choice:
    """The only size that there is, or the smallest choice."""
    return info.sizes[0] if len(info.sizes) == 1 else info.choices[0]


def leave_unreached(
    model: nn.Module,
    plans: list[Plan],
    infos: list[dict[str, LayerInfo]],
    data: Sequence[Batch],
    stats: Stats | None,
) -> tuple[list[Plan], list[dict[str, LayerInfo]], dict[str, Choice]]:
    """The plans without the experts that no calibration token reaches, and those, as they are.

    Raises WeftError where the others cannot keep the budget alone.
    """
    needs = {need for plan in plans for need in (*plan.needs, *plan.method.needs)}
    kept = set(reached(model, plans[0].layers, needs, data, stats))
    whole = {n: Choice(None, info.shape.nbytes) for n, info in infos[-1].items() if not kept.issuperset(layers_of(n))}
    if not whole:
        return plans, infos, {}
    gone = {layer for name in whole for layer in layers_of(name)}

    def without(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name not in whole}

    plans = [
        replace(
            plan,
            layers=tuple(name for name in plan.layers if name not in gone),
            joints=without(plan.joints),
            fixed=plan.fixed and without(plan.fixed),
        )
        for plan in plans
    ]
    return plans, [without(info) for info in infos], whole


def decide(
    model: nn.Module,
    plan: Plan,
    infos: Mapping[str, LayerInfo],
    budget: int,
    how: str,
    batches: Sequence[Batch],
    stats: Stats | None,
    store: Store,
) -> tuple[Plan, Mapping[str, LayerInfo], Mapping[str, Choice]]:
    """Survey the layers and spend the budget, in the order that saves work: sizes that nothing must be known for first.

    Returns the plan, with its sizes where they were known before the survey, what was found, and every layer's choice.
    """

    def spend(found: Mapping[str, LayerInfo]) -> Mapping[str, Choice]:
        extra = {name: TRIES[name](model, plan, batches, store) for name in plan.reads if name in TRIES}
        return ALLOCATIONS[how].allocate(found, budget, **extra)

    chosen: Mapping[str, Choice] | None = None
    if plan.fixed is not None:
        chosen = {name: _at(plan, info, plan.fixed[name]) for name, info in infos.items()}
    elif all(len(info.sizes) <= 1 for info in infos.values()):
        chosen = {name: [*info.sizes, info.choices[-1]][0] for name, info in infos.items()}
    elif not set(plan.reads) - set(BEFORE):
        chosen = spend(infos)
    if chosen is not None:
        plan = replace(plan, fixed={name: choice.size for name, choice in chosen.items()}, reads=())
    surveyed = plan.reads_weights or plan.carried or "weight_spectrum" in plan.reads
    found = survey(model, plan, infos, batches, stats, store) if surveyed else infos
    return plan, found, spend(found) if chosen is None else chosen


def _at(plan: Plan, info: LayerInfo, size: Any) -> Choice:
    """The choice of a size that the user gave; a rank may be one that saves nothing."""
    there = next((choice for choice in info.choices if choice.size == size), None)
    if there is not None:
        return there
    assert plan.nested is not None  # whose ranks alone are taken beyond what is offered
    return Choice(size, plan.nested.nbytes(info.shape, int(size)), method=info.choices[0].method)


def joined(chosen: Sequence[Mapping[str, Choice]]) -> dict[str, Choice]:
    """One choice a layer: of a chain, the list of sizes and all bytes."""
    if len(chosen) == 1:
        return dict(chosen[0])
    joined = {}
    for name in chosen[0]:
        parts = [stage[name] for stage in chosen]
        method = "+".join(part.method for part in parts if part.method)
        joined[name] = Choice([part.size for part in parts], sum(p.bytes for p in parts), parts[-1].loss, method)
    return joined
