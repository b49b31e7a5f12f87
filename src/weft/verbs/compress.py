"""Compress a model: calibrate, allocate, split, and replace its linear layers by fewer bytes; one method, or a chain.

compress(model, "kfac-svd", budget=0.6)                  # ranks
compress(model, "nf", budget="3.5 bits", allocate="best")   # widths of code
compress(model, ["nf3", "eora"], budget="3.5 bits")      # codes, and factors for what they lost
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from weft.allocate import Allocation, Budget, Choice, LayerInfo
from weft.allocate.base import spent
from weft.errors import WeftError
from weft.files import write_text
from weft.io.save import save_model
from weft.methods import Method
from weft.progress import track
from weft.runs.calibration import calibration_texts, check_enough
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve_device
from weft.runs.output import check_output, open_output
from weft.runs.pieces import Store
from weft.runs.record import begin
from weft.runs.report.frontier import frontier_page
from weft.runs.report.pages import report_path
from weft.stats.cache import fingerprint
from weft.stats.calibrate import Batch, Stats, calibrate, mean_loss
from weft.terms.coded_embedding import check_width, code_embeddings
from weft.terms.coverage import coverage
from weft.terms.experts import within_experts
from weft.terms.joints import layers_of
from weft.terms.layers import linear_layers, weight_of
from weft.train.windows import calibration_batches
from weft.verbs.compress_checks import (
    Stage,
    allowed_bytes,
    chain,
    check,
    check_arguments,
    check_round,
    given_sizes,
    is_sizes_file,
    joints_of,
    reads,
)
from weft.verbs.evaluate import check_context, model_size
from weft.verbs.moments import keep_unit
from weft.verbs.placing import one_shot, sequential
from weft.verbs.shrink import check_shrinks, shrinks, shrunk
from weft.verbs.spending import chooser, decide, joined, least, leave_unreached
from weft.verbs.survey import Plan, offered, unit_of

__all__ = ["Compressed", "calibrate", "compress", "needs", "plan_of", "run"]

Methods = str | Method | Sequence[str | Method | tuple[str | Method, Mapping[str, Any]]]

_PAGE = {".html": "a page with plots"}


@dataclass(frozen=True)
class Compressed:
    """What `compress` did."""

    allocation: Allocation
    seconds: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, LayerInfo] = field(default_factory=dict)
    """The curves that the choices were taken from, of the method that the budget was spent on."""


def needs(method: Methods, *, allocate: str | None = None) -> tuple[str, ...]:
    """The statistics that a method (with an allocation; None: its own) reads: what to `calibrate` for it.

    Raises WeftError for an unknown name.

    Example:
        >>> weft.needs("kfac-svd", allocate="best")
        ('input_moment', 'output_grad_moment')
    """
    from weft.methods import METHODS

    given = [method] if isinstance(method, str | Method) else [m[0] if isinstance(m, tuple) else m for m in method]
    stages = [METHODS.find(one) for one in given]
    first, last = stages[0], stages[-1]
    if first.split is None or first.kind == "adapt":
        return first.needs
    return plan_of(first, (allocate or last.allocate) if last is first else None).needs


def plan_of(method: Method, allocate: str | None, layers: Sequence[str] = ()) -> Plan:
    """A method's plan with its own options, and what an allocation reads."""
    how = reads(allocate) if allocate else ()
    options = method.options({})
    return Plan(method=method, options=options, layers=tuple(layers), reads=how, sequential=method.sequential)


_walk = sequential  # an argument of `compress` bears its name


@within_experts
def compress(
    model: nn.Module,
    method: Methods = "kfac-svd",
    *,
    budget: str | float | Budget | None = None,
    allocate: str | Path | Mapping[str, Any] | None = None,
    batches: Iterable[Batch] | None = None,
    stats: Stats | None = None,
    layers: str | Sequence[str] | None = None,
    round: int = 1,
    sequential: bool | None = None,
    correction: float | None = None,
    by_block: bool | None = None,
    seed: int = 0,
    progress: Path | Store | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
    **options: Any,
) -> Compressed:
    """Replace the model's linear layers, in place, by terms that keep `budget` of their bytes.

    Args:
        model: any transformers model with linear layers (`weft.terms.layers.linear_layers`).
        method: a name of `weft.methods()` of kind "compress" or "quantize", or a `Method`; or a list of them, each
            applied to what the one before it made: those of kind "compensate" take up what it lost. One of a list may
            have sizes to choose from. In a list, (method, {option: value}) says which method an option is for.
        budget: what is **kept**: a share of the replaced matrices' bytes (0.6, "60%"), mean bits a weight ("3.5 bits"),
            or the size of the whole model ("500MB"). None: 0.6, or whatever a method of one size takes.
        allocate: a name of `weft.allocate.ALLOCATIONS` (None: the method's own), a saved allocation's path, or a
            mapping layer -> size (None: as it is); of the last method.
        batches: calibration batches, for methods and allocations that need data; `weft.train.windows` makes them.
        stats: statistics from `weft.calibrate(model, batches, weft.needs(method))`, instead of a pass over the batches.
        layers: shell patterns of layer names, "!" before those to leave out; None for all.
        round: make every rank a multiple of this.
        sequential: recalibrate each layer on the layers compressed before it (None: as the method is published); needs
            `batches`.
        correction: share, 0 to 1, of the drift of a layer's inputs that the sequential form corrects (None: the
            method's own).
        by_block: collect one block's statistics at a time, with a pass over the batches for each (None: as many blocks
            at a time as take the model's bytes).
        seed: of methods that draw; a layer's draw depends on it and on the layer's name alone.
        progress: a directory for finished blocks, from which an interrupted call goes on; or what keeps them.
        track: (items, description) -> the same items, for a progress bar.
        options: the methods' own hyperparameters; of a list, each goes to the one that names it.

    Returns:
        The allocation, which says what was spent, and the seconds spent on survey (calibration and factorisation) and
        replacement.

    Raises:
        WeftError: unknown method, allocation, option or layer pattern; a budget out of range or below reach; data
            missing.

    Example:
        >>> done = weft.compress(model, "kfac-svd", budget=0.6, batches=batches)
        >>> done.allocation.spent <= 0.6 * done.allocation.total
        True
    """
    data = [] if batches is None else list(batches)
    settings = {"round": round, "by_block": by_block, "seed": seed} | ({"track": track} if track else {})
    check_round(round)
    plans = _plans(model, chain(method, options), layers, sequential, correction, settings)
    infos = [offered(model, plan) for plan in plans]
    at = chooser(infos)
    given = given_sizes(allocate, infos[at], plans[at], len(plans) > 1)
    if given is not None and budget is not None:
        raise WeftError(
            f"Sizes are given, which leave nothing of the budget of {budget} to choose: give one of the two."
        )
    how = "given" if given else str(allocate or plans[at].method.allocate)
    plans[at] = replace(plans[at], fixed=given) if given else replace(plans[at], reads=reads(how))
    check(plans, infos, data, stats, at)
    words, allowed = allowed_bytes(model, budget, plans, infos, given is not None, at)
    shapes = {name: info.shape for name, info in infos[-1].items()}
    plans, infos, whole = leave_unreached(model, plans, infos, data, stats)
    allowed -= spent(whole)

    began, surveying, chosen, found = time.perf_counter(), 0.0, list[Mapping[str, Choice]](), {}
    with _place(model, plans, progress) as place:
        store = _store(place, model, plans, data, stats)
        for plan in (plan for plan in plans if plan.in_unit):
            keep_unit(unit_of(model, plan, data, store), store)
        for plan, info in zip(plans, infos, strict=True):
            started = time.perf_counter()
            later = sum(least(layer).bytes for after in infos[plan.stage + 1 :] for layer in after.values())
            left = allowed - sum(map(spent, chosen)) - later
            given_stats = None if plan.stage else stats  # of the model as it was
            plan, found[plan.stage], sizes = decide(model, plan, info, left, how, data, given_stats, store)
            surveying += time.perf_counter() - started
            wanted = {name: choice.size for name, choice in sizes.items()}
            put = _walk(model, plan, wanted, data, store) if plan.sequential else one_shot(model, plan, wanted, store)
            stayed = {n: info[n].whole for n, size in wanted.items() if size is not None and n not in put}
            chosen.append({name: plan.plain(choice) for name, choice in {**sizes, **stayed}.items()})
    _mark(model, "+".join(plan.method.name for plan in plans))
    details, choices = {"round": round} if round > 1 else {}, {**joined(chosen), **whole}
    choices = {name: choices[name] for name in shapes}
    allocation = Allocation(choices, shapes, words, how, 0 if given else allowed + spent(whole), details)
    if not given:
        _say_if_nothing_done(allocation)
    seconds = {"survey": surveying, "replace": time.perf_counter() - began - surveying}
    return Compressed(allocation, seconds, found[at])


def _say_if_nothing_done(allocation: Allocation) -> None:
    if all(choice.size is None for choice in allocation.choices.values()):
        warnings.warn(
            f"The budget of {allocation.budget} keeps all {len(allocation)} matrices as they are: nothing was "
            "compressed; give a smaller one.",
            stacklevel=3,
        )


def _plans(
    model: nn.Module,
    stages: Sequence[Stage],
    layers: str | Sequence[str] | None,
    sequential: bool | None,
    correction: float | None,
    settings: Mapping[str, Any],
) -> list[Plan]:
    """A plan for each method of a chain; those after the first see what the weights were."""
    names = tuple(linear_layers(model, layers))
    kept = {name: weight_of(model.get_submodule(name)) for name in names} if len(stages) > 1 else {}
    joints = joints_of(model, names, stages[0][0])
    return [
        Plan(
            method=method,
            options=options,
            layers=names,
            joints=joints,
            stage=i,
            sequential=method.sequential if sequential is None else sequential,
            correction=method.correction if correction is None else correction,
            originals=kept if i else {},
            **settings,
        )
        for i, (method, options) in enumerate(stages)
    ]


def _store(place: Any, model: nn.Module, plans: Sequence[Plan], batches: Sequence[Batch], stats: Stats | None) -> Store:
    if place is None or isinstance(place, Store):
        return place or Store()
    return Store(Path(place), _key(model, plans, batches, stats))


def _place(model: nn.Module, plans: Sequence[Plan], progress: Path | Store | None) -> AbstractContextManager[Any]:
    """Where finished pieces lie: where the caller says, on a disk or in memory."""
    if progress is not None:
        return nullcontext(progress)
    nbytes = sum(p.nbytes for p in model.parameters())
    return tempfile.TemporaryDirectory() if any(plan.on_disk(nbytes) for plan in plans) else nullcontext()


def _key(model: nn.Module, plans: Sequence[Plan], batches: Sequence[Batch], stats: Stats | None) -> str:
    """A key of everything that decides a finished piece, the allocated sizes apart."""
    data = [*batches, *({f"{name}": t for name, t in moments.items()} for moments in (stats or {}).values())]
    decided = [(p.method.name, p.options, p.reads, p.fixed, p.round, p.sequential, p.correction, p.seed) for p in plans]
    made_of = [fingerprint(model, data, [need for p in plans for need in p.needs], plans[0].layers), str(decided)]
    return hashlib.sha256("".join(made_of).encode()).hexdigest()[:12]


def _mark(model: nn.Module, method: str) -> None:
    """Have `save_pretrained` write a weft directory; a plain module without a configuration is left as it is."""
    from weft.io.quantizer import mark

    if isinstance(model, PreTrainedModel):
        mark(model, method=method)


def run(
    model: str,
    out: str | Path,
    *,
    method: str = "kfac-svd",
    then: str | None = None,
    then_options: Mapping[str, Any] | None = None,
    budget: str | float | None = None,
    allocate: str | None = None,
    calibration: str | Path | None = None,
    windows: int = 32,
    window: int = 512,
    bos: bool | None = None,
    round: int = 1,
    layers: Sequence[str] | None = None,
    sequential: bool | None = None,
    by_block: bool | None = None,
    seed: int = 0,
    embeddings: str | None = None,
    report: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`weft compress`: read a model, calibrate, compress, write a directory with `allocation.json` and `run.json`.

    `then` is a method for what the first one made, with `then_options`; `report` a page (.html) of what was chosen,
    and why; `embeddings` "8bit" codes the embedding and the head first. Arguments are those of `compress` and of
    `weft.train.windows.calibration_batches`; the result is what `run.json` holds as metrics. An interrupted run keeps
    its finished blocks beside `out` and goes on from them.

    Raises:
        WeftError: any argument that cannot work, before the model is loaded where it can be told.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("options", "device")} | options
    methods: list[Any] = [method, *([(then, then_options or {})] if then else [])]
    if then_options and not then:
        raise WeftError("--then-option is for the method of --then; give one, such as --then eora.")
    if report is not None:
        report_path(report, _PAGE)
    whole = shrinks(method)
    if whole is not None:
        given = {"then": then, "allocate": allocate, "layers": layers, "sequential": sequential, "by_block": by_block}
        check_shrinks(
            whole, options, budget, {**given, "round": round != 1, "report": report, "embeddings": embeddings}
        )
    check_arguments([] if whole else methods, budget, allocate, round, windows, window, seed, options)
    check_width(embeddings)
    check_output(out, arguments)
    spent = None if allocate is None or is_sizes_file(allocate) else str(allocate)
    read = whole is not None or report is not None or any(needs([one], allocate=spent) for one in methods)
    texts, text = calibration_texts(calibration, model, read=read)
    target = resolve_device(device)
    record = begin("compress", arguments, seed=seed, device=target)
    check_context(load_config(model, trust_remote_code=trust_remote_code), window)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    data = calibration_batches(tokenizer, texts, windows=windows, window=window, seed=seed, bos=bos)
    source = load_model(model, device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    tokens = check_enough(source, data, layers)
    with open_output(out, arguments) as place:
        if whole is not None:
            source, metrics = shrunk(source, whole, budget, data, place, options)
        else:
            how: dict[str, Any] = {"budget": budget, "allocate": allocate, "batches": data, "layers": layers}
            how |= {"sequential": sequential, "by_block": by_block, "progress": place.progress, "track": track}
            how |= {"round": round, "seed": seed, **options}
            page = None if report is None else report_path(report, _PAGE)
            metrics = _compressed(source, methods, Path(model).name, page, place.path, how, embeddings)
        metrics |= {"calibration": text, "calibration_tokens": tokens}
        save_model(source, tokenizer, place.path, run=record.write(place.path, metrics))
    return {"output": str(out), **({"report": str(report)} if report else {}), **metrics}


def _compressed(
    source: PreTrainedModel,
    methods: Methods,
    name: str,
    page: Path | None,
    place: Path,
    how: Mapping[str, Any],
    embeddings: str | None,
) -> dict[str, Any]:
    """Compress in place, with the allocation beside it and, where asked for, the page of what was chosen."""
    before, loss = _size(source), 0.0 if page is None else mean_loss(source, how["batches"])
    if embeddings is not None:
        code_embeddings(source)
    done = compress(source, methods, **how)
    if page is not None:
        measured = {"before": loss, "after": mean_loss(source, how["batches"])}
        write_text(page, frontier_page(name, done.allocation, done.layers, measured))
    done.allocation.save(place / "allocation.json")
    offered = {name for name, info in done.layers.items() if info.sizes}
    sites = (site for site, size in done.allocation.items() if size is not None or site in offered)
    reached = [layer for site in sites for layer in layers_of(site)]
    return {**_metrics(before, _size(source), done), **coverage(source, reached).facts()}


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
        "matrices": sum(len(layers_of(site)) for site in allocation),
        "matrices_dense": sum(len(layers_of(site)) for site, size in allocation.items() if size is None),
        "matrix_bytes_before": allocation.total,
        "matrix_bytes_allowed": allocation.allowed,
        "matrix_bytes": allocation.spent,
        "share_kept": allocation.spent / allocation.total,
        "bits_per_weight": allocation.bits_per_weight,
        "seconds_survey": done.seconds["survey"],
        "seconds_replace": done.seconds["replace"],
    }
