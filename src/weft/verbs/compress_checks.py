"""What `compress` refuses before any work starts, each with one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.allocate import ALLOCATIONS, Allocation, Budget, LayerInfo, Ranks
from weft.allocate.base import check_ranks, check_reach
from weft.errors import WeftError, unknown
from weft.io.precision import layer_bytes, saved_dtype, saved_size
from weft.methods.base import LowRankSplit, Method
from weft.stats.calibrate import Batch, Stats
from weft.terms.layers import stored_weight, weight_of
from weft.verbs.truncation import Plan

__all__ = ["allowed_parameters", "check", "check_options", "check_round", "given_ranks", "is_ranks_file", "reads"]


def check(plan: Plan, batches: Sequence[Batch], stats: Stats | None, multiple: int) -> None:
    """Everything that can be refused before work starts."""
    check_round(multiple)
    check_options(plan.method, plan.options)
    if not 0 <= plan.correction <= 1:
        raise WeftError(f"The correction is {plan.correction}; it is a share between 0 and 1.")
    if not batches and (plan.sequential or "measure" in plan.reads or (plan.needs and stats is None)):
        raise WeftError(f"The method {plan.method.name!r} needs calibration text here; give batches.")
    for name in plan.layers if stats is not None else ():
        missing = [need for need in plan.needs if need not in (stats or {}).get(name, {})]
        if missing:
            raise WeftError(f"The statistics lack {missing[0]} of layer {name}; calibrate with needs={plan.needs}.")


def given_ranks(allocate: Any, infos: Mapping[str, LayerInfo]) -> Ranks | None:
    """Ranks that the user gives for exactly these layers, or None when an allocation is to find them."""
    shapes = {name: info.shape for name, info in infos.items()}
    source = "allocate"
    if isinstance(allocate, str | Path):
        if not is_ranks_file(allocate):
            return None
        source, allocate = str(allocate), Allocation.load(allocate)
    if allocate is None:
        return None
    theirs = allocate.shapes if isinstance(allocate, Allocation) else shapes
    strange = sorted(name for name in {*allocate, *shapes} if theirs.get(name) != shapes.get(name))
    strange = strange or sorted(set(allocate) ^ set(shapes))
    if strange:
        raise WeftError(
            f"{source} and the model differ in the layer {strange[0]}; make an allocation for this model, "
            "or name its layers by a pattern."
        )
    check_ranks(allocate, shapes, source)
    return dict(allocate)


def is_ranks_file(allocate: str | Path) -> bool:
    """Whether a file of ranks is meant, and not the name of an allocation."""
    return str(allocate) not in ALLOCATIONS and (str(allocate).endswith(".json") or Path(allocate).is_file())


def allowed_parameters(model: nn.Module, budget: Budget, infos: Mapping[str, LayerInfo], multiple: int) -> int:
    """Parameters that the budget leaves to these layers. Raises WeftError where it is out of reach, or already met."""
    numbers = sum(stored_weight(model.get_submodule(name))[0] for name in infos)
    first = next(iter(infos))
    itemsize = saved_dtype(model, f"{first}.weight", weight_of(model.get_submodule(first))).itemsize
    other_bytes = saved_size(model)[1] - layer_bytes(model, infos)
    allowed = budget.parameters(infos, other_bytes=other_bytes, itemsize=itemsize)
    total = sum(info.size for info in infos.values())
    if numbers < total and allowed >= numbers:
        raise WeftError(
            f"The model is compressed already: its matrices keep {numbers / total:.4f} of their parameters, within the "
            f"budget of {budget}; give a smaller budget, or compress the original model."
        )
    check_reach(infos, allowed, multiple)
    return allowed


def check_round(multiple: int) -> None:
    """Raises WeftError for a multiple below 1."""
    if multiple < 1:
        raise WeftError(f"--round is {multiple}: ranks are multiples of a whole number from 1 on.")


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Options that cannot work are told by factorising one number."""
    assert isinstance(method.split, LowRankSplit)
    ones = {need: torch.ones(1, 1) if need.endswith(("moment", "grad")) else torch.ones(1) for need in method.needs}
    try:
        method.split.factorise(torch.ones(1, 1, dtype=torch.float64), ones, **options)
    except WeftError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise WeftError(f"{method.name} cannot work with {given}: {error}.") from error


def reads(allocate: Any) -> tuple[str, ...]:
    """The fields of `LayerInfo` that an allocation looks at. Raises WeftError with the nearest names."""
    if allocate not in ALLOCATIONS:
        raise unknown("allocation", str(allocate), ALLOCATIONS)
    fields: tuple[str, ...] = ALLOCATIONS[allocate].READS
    return fields
