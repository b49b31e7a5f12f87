"""Compress a model: calibrate, allocate, factorise, and replace its linear layers by fewer numbers."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.allocate import ALLOCATIONS, Allocation, Budget, LayerInfo, Ranks
from weft.errors import WeftError
from weft.io.save import save_model
from weft.methods import find
from weft.methods.base import Method
from weft.runs.calibration import calibration_texts, check_enough
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve_device
from weft.runs.output import check_output, open_output
from weft.runs.progress import track
from weft.runs.record import begin
from weft.seeds import check_seed
from weft.stats.cache import fingerprint
from weft.stats.calibrate import Batch, Stats, calibrate, frozen, to_device, token_loss
from weft.terms.layers import linear_layers, shape_of
from weft.terms.layers import replace as put_layer
from weft.train.windows import calibration_batches
from weft.verbs.compress_checks import (
    allowed_parameters,
    check,
    check_options,
    check_round,
    given_ranks,
    is_ranks_file,
    reads,
)
from weft.verbs.evaluate import check_context, model_size
from weft.verbs.truncation import Plan, Store, one_shot, sequential, survey, surveyed_factors, truncate

__all__ = ["Compressed", "calibrate", "compress", "needs", "run", "sensitivity"]


@dataclass(frozen=True)
class Compressed:
    """What `compress` did."""

    allocation: Allocation
    seconds: Mapping[str, float] = field(default_factory=dict)


def needs(method: str, *, allocate: str | None = None) -> tuple[str, ...]:
    """The statistics that a method (with an allocation; None: its own) reads: what to `calibrate` for it.

    Raises WeftError for an unknown name.
    """
    found = find(method)
    if found.kind != "compress":
        return found.needs
    return Plan(method=found, options={}, layers=(), reads=reads(allocate or found.allocate)).needs


_walk = sequential  # an argument of `compress` bears its name


def compress(
    model: nn.Module,
    method: str | Method = "kfac-svd",
    *,
    budget: str | float | Budget = 0.6,
    allocate: str | Path | Mapping[str, int | None] | None = None,
    batches: Iterable[Batch] | None = None,
    stats: Stats | None = None,
    layers: str | Sequence[str] | None = None,
    round: int = 1,
    sequential: bool | None = None,
    correction: float | None = None,
    by_block: bool = False,
    progress: Path | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
    **options: Any,
) -> Compressed:
    """Replace the model's linear layers, in place, by factors that keep `budget` of their parameters.

    Args:
        model: any transformers model with linear layers (`weft.terms.layers.linear_layers`).
        method: a name of `weft.methods()` of kind "compress", or a `Method`.
        budget: what is **kept**: a share of the replaced matrices' parameters (0.6, "60%"), or the size of the whole
            model ("500MB").
        allocate: a name of `weft.allocate.ALLOCATIONS` (None: the method's own), a saved allocation's path, or a
            mapping layer -> rank (None: dense).
        batches: calibration batches, for methods and allocations that need data; `weft.train.data.calibration_batches`
            makes them.
        stats: statistics from `weft.calibrate(model, batches, weft.needs(method))`, instead of a pass over the batches.
        layers: shell patterns of layer names; None for all.
        round: make every rank a multiple of this.
        sequential: recalibrate each layer on the layers compressed before it (None: as the method is published); needs
            `batches`.
        correction: share, 0 to 1, of the drift of a layer's inputs that the sequential form corrects (None: the
            method's own).
        by_block: collect one block's statistics at a time, with a pass over the batches for each: bounded memory for
            large models.
        progress: a directory for finished blocks, from which an interrupted call goes on.
        track: (items, description) -> the same items, for a progress bar.
        options: the method's own hyperparameters.

    Returns:
        The allocation, which says what was spent, and the seconds spent on survey (calibration and factorisation) and
        replacement.

    Raises:
        WeftError: unknown method, allocation, option or layer pattern; a budget out of range or below reach; data
            missing.
    """
    found = find(method, "compress") if isinstance(method, str) else method
    plan = Plan(
        method=found,
        options=found.options(options),
        layers=tuple(linear_layers(model, layers)),
        sequential=found.sequential if sequential is None else sequential,
        correction=found.correction if correction is None else correction,
        by_block=by_block,
    )
    plan = replace(plan, track=track) if track else plan
    data = [] if batches is None else list(batches)
    infos = {name: LayerInfo(shape_of(model.get_submodule(name))) for name in plan.layers}
    given = given_ranks(allocate, infos)
    plan = replace(plan, fixed=given) if given else replace(plan, reads=reads(allocate or found.allocate))
    check(plan, data, stats, round)
    share = Budget.parse(budget)
    allowed = 0 if given else allowed_parameters(model, share, infos, round)

    began = time.perf_counter()
    # one block's statistics at a time means that what was made of the others is not in memory either
    with tempfile.TemporaryDirectory() if by_block and progress is None else nullcontext(progress) as place:
        store = Store() if place is None else Store(Path(place), _key(model, plan, data, stats))
        infos = survey(model, plan, data, stats, store)
        surveyed = time.perf_counter()
        shapes = {name: info.shape for name, info in infos.items()}
        if given is None:
            how = str(allocate or found.allocate)
            ranks = _ranks(how, model, plan, infos, allowed, round, data, store)
            allocation = Allocation(ranks, shapes, str(share), how, allowed, {"round": round} if round > 1 else {})
        else:
            allocation = Allocation(given, shapes, allocate="given")
        if plan.sequential:
            _walk(model, plan, allocation.ranks, data, store)
        else:
            one_shot(model, plan, allocation.ranks, store)
    _mark(model, found.name)
    return Compressed(allocation, {"survey": surveyed - began, "replace": time.perf_counter() - surveyed})


def _ranks(
    allocate: str,
    model: nn.Module,
    plan: Plan,
    infos: Mapping[str, LayerInfo],
    allowed: int,
    multiple: int,
    batches: Sequence[Batch],
    store: Store,
) -> Ranks:
    extra = {"measure": sensitivity(model, plan, batches, store)} if "measure" in plan.reads else {}
    ranks: Ranks = ALLOCATIONS[allocate].allocate(infos, allowed, multiple=multiple, **extra)
    return ranks


def _key(model: nn.Module, plan: Plan, batches: Sequence[Batch], stats: Stats | None) -> str:
    """A key of everything that decides a finished piece, the ranks apart."""
    data = [*batches, *({f"{name}": t for name, t in moments.items()} for moments in (stats or {}).values())]
    decided = [plan.method.name, plan.options, plan.reads, plan.fixed, plan.sequential, plan.correction]
    made_of = [fingerprint(model, data, plan.needs, plan.layers), str(decided)]
    return hashlib.sha256("".join(made_of).encode()).hexdigest()[:12]


def sensitivity(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], store: Store
) -> Callable[[str, Sequence[int]], list[float]]:
    """(layer, ranks) -> the loss a token of all the calibration text, with only that layer truncated to each rank."""
    factors = dict(surveyed_factors(model, plan, store))

    @torch.no_grad()
    def measure(name: str, ranks: Sequence[int]) -> list[float]:
        layer, losses = model.get_submodule(name), []
        with frozen(model):
            for rank in ranks:
                truncate(model, name, factors[name], rank)
                losses.append(_loss(model, batches))
                put_layer(model, name, layer)
        return losses

    return measure


def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss of a prediction over all batches."""
    total, predictions = 0.0, 0
    for batch in batches:
        loss, count = token_loss(model, to_device(batch, model))
        total, predictions = total + float(loss) * count, predictions + count
    return total / predictions


def _mark(model: nn.Module, method: str) -> None:
    """Have `save_pretrained` write a weft directory; a plain module without a configuration is left as it is."""
    from transformers import PreTrainedModel

    from weft.io.quantizer import mark

    if isinstance(model, PreTrainedModel):
        mark(model, method=method)


def run(
    model: str,
    out: str | Path,
    *,
    method: str = "kfac-svd",
    budget: str | float = 0.6,
    allocate: str | None = None,
    calibration: str | Path | None = None,
    windows: int = 32,
    window: int = 512,
    round: int = 1,
    layers: Sequence[str] | None = None,
    sequential: bool | None = None,
    by_block: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`weft compress`: read a model, calibrate, compress, write a directory with `allocation.json` and `run.json`.

    Arguments are those of `compress` and of `weft.train.windows.calibration_batches`. The result is what `run.json`
    holds as metrics. An interrupted run keeps its finished blocks beside `out` and goes on from them.

    Raises:
        WeftError: any argument that cannot work, before the model is loaded where it can be told.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("options", "device")} | options
    _check_arguments(method, budget, allocate, round, windows, window, seed, options)
    check_output(out, arguments)
    texts, text = calibration_texts(calibration, model)
    target = resolve_device(device)
    record = begin("compress", arguments, seed=seed, device=target)
    check_context(load_config(model, trust_remote_code=trust_remote_code), window)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    data = calibration_batches(tokenizer, texts, windows=windows, window=window, seed=seed)
    source = load_model(model, device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    tokens = check_enough(source, data, layers)
    with open_output(out, arguments) as place:
        before = _size(source)
        done = compress(
            source, method, budget=budget, allocate=allocate, batches=data, layers=layers, round=round,
            sequential=sequential, by_block=by_block, progress=place.progress, track=track, **options,
        )  # fmt: skip
        metrics = {**_metrics(before, _size(source), done), "calibration": text, "calibration_tokens": tokens}
        done.allocation.save(place.path / "allocation.json")
        save_model(source, tokenizer, place.path, run=record.write(place.path, metrics))
    return {"output": str(out), **metrics}


def _check_arguments(
    method: str,
    budget: Any,
    allocate: Any,
    round: int,
    windows: int,
    window: int,
    seed: int,
    options: Mapping[str, Any],
) -> None:
    found = find(method, "compress")
    check_options(found, found.options(options))
    Budget.parse(budget)
    check_seed(seed)
    if allocate is not None and is_ranks_file(allocate):
        Allocation.load(allocate)
    elif allocate is not None:
        reads(allocate)
    check_round(round)
    if windows < 1 or window < 2:
        raise WeftError(
            f"Calibration takes --windows of at least 1 and --window of at least 2, not {windows} and {window}."
        )


def _size(model: nn.Module) -> dict[str, int]:
    parameters, nbytes = model_size(model)
    return {"parameters": parameters, "bytes": nbytes}


def _metrics(before: Mapping[str, int], after: Mapping[str, int], done: Compressed) -> dict[str, Any]:
    allocation = done.allocation
    return {
        "parameters_before": before["parameters"],
        "parameters": after["parameters"],
        "bytes_before": before["bytes"],
        "bytes": after["bytes"],
        "matrices": len(allocation),
        "matrices_dense": sum(rank is None for rank in allocation.values()),
        "matrix_parameters_before": allocation.total,
        "matrix_parameters_allowed": allocation.allowed,
        "matrix_parameters": allocation.spent,
        "share_kept": allocation.spent / allocation.total,
        "seconds_survey": done.seconds["survey"],
        "seconds_replace": done.seconds["replace"],
    }
