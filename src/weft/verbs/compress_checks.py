"""What `compress` refuses before any work starts, each with one sentence that says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.allocate import ALLOCATIONS, Allocation, Budget, LayerInfo
from weft.allocate.base import below_reach, check_reach
from weft.errors import WeftError, unknown
from weft.io.precision import layer_bytes, saved_size
from weft.methods import METHODS
from weft.methods.base import LowRankSplit, Method
from weft.seeds import check_seed
from weft.stats.calibrate import Batch, Stats
from weft.terms.adapters import adapters_of
from weft.terms.experts import names_an_expert
from weft.terms.joints import Joint
from weft.terms.layers import eligible, stored_weight
from weft.verbs.spending import least
from weft.verbs.survey import Plan

__all__ = [
    "Stage",
    "allowed_bytes",
    "chain",
    "check",
    "check_arguments",
    "check_options",
    "check_round",
    "given_sizes",
    "is_sizes_file",
    "joints_of",
    "reads",
]

_TOLD = 24  # sizes that an error lists

Stage = tuple[Method, dict[str, Any]]
"""A method of a chain and its options."""


def chain(method: Any, options: Mapping[str, Any]) -> list[Stage]:
    """The methods of a chain, each with its options: those that it names.

    Raises:
        WeftError: an unknown method; one that does not replace weights, or compensates for nothing; an option that none
            or several of them have.
    """
    given = [method] if isinstance(method, str | Method) else list(method)
    pairs = [one if isinstance(one, tuple) else (one, {}) for one in given]
    kinds = ("compress", "quantize", "compensate")
    found = [METHODS.find(one, *(kinds if i else (*kinds[:2], "prune"))) for i, (one, _) in enumerate(pairs)]
    if not found:
        raise WeftError("There is no method; give one, or a list of them.")
    if found[0].kind == "prune":
        home = "weft.verbs.shrink.shrink" if found[0].shrink else f"weft finetune MODEL --method {found[0].name}"
        raise WeftError(f"{found[0].name} cuts a model to another shape, and no weight to fewer bytes: use {home}.")
    for first, second in pairwise(found):
        if second.kind != "compensate":
            raise WeftError(
                f"{second.name} would replace what {first.name} made; let a method of kind compensate follow it, such "
                "as eora."
            )
    if len(found) > 1:
        if found[0].joints is not None:
            raise WeftError(
                f"{found[0].name} cuts several layers together and is followed by no other method; give it alone."
            )
        _check_owners(found, options)
    alone = len(found) == 1
    return [
        (one, one.options({**{k: v for k, v in options.items() if alone or k in one.defaults}, **own}))
        for one, (_, own) in zip(found, pairs, strict=True)
    ]


def _check_owners(found: Sequence[Method], options: Mapping[str, Any]) -> None:
    """Every option belongs to one method of the chain."""
    for name in options:
        owners = [one.name for one in found if name in one.defaults]
        if len(owners) != 1:
            known = ", ".join(f"{one.name}: {', '.join(one.defaults) or 'none'}" for one in found)
            raise WeftError(
                f"The option {name!r} belongs to {' and '.join(owners) or 'none of the methods'}; their options are "
                f"({known})."
            )


def check(
    plans: Sequence[Plan],
    infos: Sequence[Mapping[str, LayerInfo]],
    batches: Sequence[Batch],
    stats: Stats | None,
    choosing: int,
) -> None:
    """Everything that can be refused before work starts; `choosing` is the stage whose sizes are allocated."""
    for plan, info in zip(plans, infos, strict=True):
        check_options(plan.method, plan.options)
        _check_plan(plan, batches, stats if plan.stage == 0 else None)
        if plan is not plans[choosing] and any(len(layer.sizes) > 1 for layer in info.values()):
            one = "+".join(plan.method.name for plan in plans)
            raise WeftError(
                f"{plan.method.name} offers several sizes and so does {plans[choosing].method.name}: give one of them "
                f"a single size, such as nf3 or rank=32, or let auto choose both, with methods={one}."
            )


def _check_plan(plan: Plan, batches: Sequence[Batch], stats: Stats | None) -> None:
    if not 0 <= plan.correction <= 1:
        raise WeftError(f"The correction is {plan.correction}; it is a share between 0 and 1.")
    if plan.joints and plan.sequential:
        raise WeftError(
            f"{plan.method.name} cuts layers together that are fed one after the other, so that it has no sequential "
            "form; leave --sequential out."
        )
    if plan.mixed and plan.round > 1:
        raise WeftError(
            f"--round makes the ranks of one method multiples; {plan.method.name} chooses among the sizes of several: "
            "leave it out."
        )
    looks = plan.sequential or plan.tries or {"influence", "relevance"} & set(plan.reads)
    if not batches and (looks or (plan.needs and stats is None)):
        raise WeftError(f"The method {plan.method.name!r} needs calibration text here; give batches.")
    if plan.nested is None and {"spectrum", "weight_spectrum"} & set(plan.reads):
        raise WeftError(
            f"This allocation reads singular values, and {plan.method.name} has none; give allocate='best' or 'equal'."
        )
    if plan.method.kind == "compensate" and plan.tries:
        raise WeftError(
            "This allocation measures what a cut does to the model as it is now, which says nothing of what "
            f"{plan.method.name} brings back; give allocate='best' or 'equal'."
        )
    for name in plan.layers if stats is not None else ():
        missing = [need for need in plan.needs if need not in (stats or {}).get(name, {})]
        if missing and (name in (stats or {}) or not names_an_expert(name)):  # one that no token reached stays
            raise WeftError(f"The statistics lack {missing[0]} of layer {name}; calibrate with needs={plan.needs}.")


def joints_of(model: nn.Module, layers: Sequence[str], method: Method) -> dict[str, Joint]:
    """The joints of these layers that a method splits, by name; none for a method that takes every layer by itself.

    Raises:
        WeftError: there are none, or the layers are a part of one. A warning says how many layers are in none.
    """
    if method.joints is None:
        return {}
    found, chosen = {joint.name: joint for joint in method.joints(model, list(eligible(model)))}, set(layers)
    mine = {name: {member.layer for member in joint.members.values()} for name, joint in found.items()}
    broken = next((name for name, members in mine.items() if 0 < len(members & chosen) < len(members)), None)
    if broken is not None:
        raise WeftError(f"{method.name} cuts the layers {broken} together: name all of them, or none.")
    joints = {name: joint for name, joint in found.items() if mine[name] <= chosen}
    if not joints:
        raise WeftError(
            f"{method.name} finds no layers in this {type(model).__name__} that it could cut together; give a method "
            "that takes every layer by itself, such as kfac-svd."
        )
    left = [name for name in layers if not any(name in members for members in mine.values())]
    if left:
        warnings.warn(
            f"{method.name} leaves {len(left)} of {len(layers)} layers as they are, such as {left[0]}: nothing that "
            "it knows how to cut together.",
            stacklevel=2,
        )
    return joints


def given_sizes(
    allocate: Any, infos: Mapping[str, LayerInfo], plan: Plan, chained: bool = False
) -> dict[str, Any] | None:
    """Sizes that the user gives for exactly these layers, or None when an allocation is to find them."""
    source = "allocate"
    if isinstance(allocate, str | Path):
        if not is_sizes_file(allocate):
            return None
        source, allocate = str(allocate), Allocation.load(allocate)
    if allocate is None:
        return None
    shapes: dict[str, Any] = {name: info.shape for name, info in infos.items()}
    theirs = allocate.shapes if isinstance(allocate, Allocation) else shapes
    strange = sorted(name for name in {*allocate, *shapes} if theirs.get(name) != shapes.get(name))
    strange = strange or sorted(set(allocate) ^ set(shapes))
    if strange:
        raise WeftError(
            f"{source} and the model differ in the layer {strange[0]}; make an allocation for this model, "
            "or name its layers by a pattern."
        )
    if isinstance(allocate, Allocation) and not plan.mixed and not chained:
        _check_methods(source, allocate, plan.method)
    # of a chain, the file lists the sizes of all its methods
    given = {n: size[plan.stage] if chained and isinstance(size, list) else size for n, size in allocate.items()}
    if plan.mixed:
        said = allocate.choices if isinstance(allocate, Allocation) else {}
        given = {n: _of_candidate(size, said[n].method if n in said else "") for n, size in given.items()}
    for name, size in given.items():
        _check_size(source, name, size, infos[name], plan)
    return given


def _check_methods(source: str, allocation: Allocation, method: Method) -> None:
    """Raises WeftError for sizes of a method whose numbers mean something else: bits are no ranks."""
    of = {name: c.method for name, c in allocation.choices.items() if c.size is not None and c.method}
    other = next((name for name, theirs in of.items() if theirs != method.name and not _ranks(method, theirs)), None)
    if other is not None:
        raise WeftError(
            f"{source} gives {other} a size of {of[other]}, not of {method.name}: give --method {of[other]}."
        )


def _ranks(method: Method, other: str) -> bool:
    """Whether the sizes of both methods are ranks."""
    known = METHODS.known(other)
    return known is not None and all(isinstance(one.split, LowRankSplit) for one in (method, known))


def _of_candidate(size: Any, method: str) -> Any:
    """A size of a mixture: (candidate, size), hashable; None stays."""
    if size is None:
        return None
    pair = (method, size) if method else size
    return tuple(tuple(part) if isinstance(part, list) else part for part in pair) if _is_pair(pair) else size


def _is_pair(size: Any) -> bool:
    return isinstance(size, list | tuple) and len(size) == 2


def _check_size(source: str, name: str, size: Any, info: LayerInfo, plan: Plan) -> None:
    """Raises WeftError for a size, given by `source`, that the method cannot give this matrix."""
    out, inn = info.shape
    if plan.nested is not None:
        whole = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not (whole and 1 <= size <= min(out, inn)):
            raise WeftError(
                f"{source} gives {name} the rank {size!r}, but a {out} x {inn} matrix has ranks from 1 to "
                f"{min(out, inn)}, or is left dense."
            )
    elif size not in [choice.size for choice in info.choices]:
        known = ", ".join(str(choice.size) for choice in info.sizes[:_TOLD]) + ", ..." * (len(info.sizes) > _TOLD)
        what = "it" if name in plan.joints else f"a {out} x {inn} matrix"
        raise WeftError(
            f"{source} gives {name} the size {size!r}, but {plan.method.name} offers {known or 'nothing'} for {what}, "
            "or leaves it dense."
        )


def is_sizes_file(allocate: str | Path) -> bool:
    """Whether a file of sizes is meant, and not the name of an allocation."""
    return str(allocate) not in ALLOCATIONS and (str(allocate).endswith(".json") or Path(allocate).is_file())


def allowed_bytes(
    model: nn.Module,
    budget: str | float | Budget | None,
    plans: Sequence[Plan],
    infos: Sequence[Mapping[str, LayerInfo]],
    given: bool,
    choosing: int,
) -> tuple[str, int]:
    """The budget in words, and the bytes that it leaves to these layers.

    Raises WeftError where it is out of reach, or already met.
    """
    adapters = adapters_of(model)
    if adapters:
        raise WeftError(
            f"There are adapters on this model ({', '.join(adapters)}); merge or remove them first, then compress."
        )
    smallest = [{name: least(info) for name, info in layers.items()} for layers in infos]
    floor = sum(choice.bytes for stage in smallest for choice in stage.values())
    single = all(len(info.sizes) <= 1 for layers in infos for info in layers.values())
    if budget is None and plans[choosing].method.kind == "compress":
        budget = 0.6
    if given or (budget is None and single):
        return "", floor
    parsed = Budget.parse(_needed(budget, plans[choosing]))
    numbers = sum(stored_weight(model.get_submodule(name))[0] for name in plans[-1].layers)
    nbytes = layer_bytes(model, plans[-1].layers)
    shapes = [info.shape for info in infos[-1].values()]
    allowed = parsed.allowed(shapes, other_bytes=saved_size(model)[1] - nbytes)
    total = sum(shape.numel for shape in shapes)
    if numbers < total and allowed >= nbytes:
        raise WeftError(
            f"The model is compressed already: its matrices keep {numbers / total:.4f} of their parameters, within the "
            f"budget of {parsed}; give a smaller budget, or compress the original model."
        )
    if len(plans) == 1 and not single:
        check_reach(infos[0], allowed)
    elif floor > allowed:
        raise below_reach(
            infos[0], {f"{i}{n}": c for i, stage in enumerate(smallest) for n, c in stage.items()}, allowed
        )
    return str(parsed), allowed


def _needed(budget: str | float | Budget | None, plan: Plan) -> str | float | Budget:
    if budget is None:
        raise WeftError(f"{plan.method.name} offers several sizes: say what to keep, as budget='3.5 bits' or 0.25.")
    return budget


def check_round(multiple: int) -> None:
    """Raises WeftError for a multiple below 1."""
    if multiple < 1:
        raise WeftError(f"--round is {multiple}: ranks are multiples of a whole number from 1 on.")


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Options that cannot work are told by factorising one number."""
    if not isinstance(method.split, LowRankSplit):
        return
    ones = {need: torch.ones(1, 1) if need.endswith(("moment", "grad")) else torch.ones(1) for need in method.needs}
    try:
        method.split.factorise(torch.ones(1, 1, dtype=torch.float64), ones, **options)
    except WeftError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise WeftError(f"{method.name} cannot work with {given}: {error}.") from error


def reads(allocate: Any) -> tuple[str, ...]:
    """What an allocation looks at. Raises WeftError with the nearest names."""
    if allocate not in ALLOCATIONS:
        raise unknown("allocation", str(allocate), ALLOCATIONS)
    return ALLOCATIONS[allocate].reads


def check_arguments(
    methods: Sequence[Any],
    budget: Any,
    allocate: Any,
    round: int,
    windows: int,
    window: int,
    seed: int,
    options: Mapping[str, Any],
) -> None:
    """What can be refused of the arguments of the verb before anything is read. Raises WeftError."""
    for found, chosen in chain(methods, options) if methods else ():
        check_options(found, chosen)
    if budget is not None:
        Budget.parse(budget)
    check_seed(seed)
    if allocate is not None and is_sizes_file(allocate):
        Allocation.load(allocate)
    elif allocate is not None:
        reads(allocate)
    check_round(round)
    if windows < 1 or window < 2:
        raise WeftError(
            f"Calibration takes --windows of at least 1 and --window of at least 2, not {windows} and {window}."
        )
