"""Combine: several low-rank adapters of one base become one adapter, without the base model.

    weft.combine(["a/", "b/"], method="lego", rank=16, weights=[1.0, 0.5], out="ab/")

    linear   w_1 delta_1 + ... + w_n delta_n, exactly, in the smallest rank that holds it
    cat      the same sum with the factors side by side; ranks add up
    svd      its best approximation of the given rank
    lego     one rank for each of `rank` clusters of the adapters' ranks (`weft.merging.lego`)

Weights are 1 where none are given: the sum, as adapters in use on one model add up. [1/n, ...] is their mean.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weft.errors import WeftError, unknown
from weft.io.adapters import LooseAdapter, check_directory, read_adapter
from weft.io.base import Base, other_weights
from weft.io.peft import why_not_peft
from weft.merging import MERGERS, Pair
from weft.runs.output import check_output, open_output
from weft.runs.progress import say
from weft.runs.record import begin
from weft.seeds import check_seed, generator
from weft.terms import LowRank, Term
from weft.terms.adapters import Adapter
from weft.terms.factors import sum_factors

__all__ = ["combine", "common_base", "common_pairs", "run"]

RANKED = ("svd", "lego")
"""The methods that have a choice of rank."""


@torch.no_grad()
def combine(
    adapters: Sequence[str | os.PathLike[str]],
    method: str = "linear",
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> LooseAdapter:
    """One adapter of several: `weft.load_adapter(model, combined)` puts it on, `combined.save(directory)` writes it.

    Args:
        adapters: directories, weft's or PEFT's.
        method: "linear", "cat", "svd" or "lego", see above.
        rank: of the result, for "svd" and "lego"; None for the largest of the adapters' ranks. That of the two exact
            methods follows from the adapters.
        weights: one for each adapter; a negative one takes it away.
        out: also write the result there, for weft and for PEFT.
        seed: of the clustering.
        **options: of "lego": canonical, normalise, reweight, restarts.

    Raises:
        WeftError: no adapters, or what is none; a delta that is no product of thin matrices (DoRA and the like);
            adapters of different bases; weights of another number; a rank above all ranks together; an unknown method
            or option; `out` is not empty. Nothing is then written.
    """
    merger = _merger(method, options)
    amounts = _weights(adapters, weights)
    if out is not None:
        check_output(out, {})
    loose = [read_adapter(path) for path in adapters]
    base = common_base(adapters, loose)
    pairs = common_pairs(adapters, loose, amounts)
    chosen = _rank(pairs, rank, method)
    terms: dict[str, dict[str, Term]] = {}
    for layer, found in pairs.items():
        k = min(chosen, sum(A.shape[0] for _, A in found))
        B, A = merger(found, k, generator(check_seed(seed), method, layer), **options)
        terms[layer] = {"combined": LowRank.from_factors(B.float(), A.float())}
    made = LooseAdapter(Adapter("combined", "lora", terms), base)
    record = {"method": method, "weights": amounts, "seed": seed, "options": options}
    made.adapter.settings.update(rank=made.rank, combined=record)
    if out is not None:
        made.save(out)
    return made


def run(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | Path,
    *,
    method: str = "linear",
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """`weft combine`: the same on paths, with `run.json`. Raises WeftError as `combine` does."""
    arguments = {key: value for key, value in locals().items() if key != "options"} | options
    check_output(out, arguments)
    _merger(method, options)
    _weights(adapters, weights)
    record = begin("combine", arguments, seed=check_seed(seed))
    with open_output(out, arguments) as place:
        made = combine(adapters, method, rank, weights, out=place.path, seed=seed, **options)
        found = made.adapter.all_terms()
        metrics = {
            "layers": len(found),
            "rank": made.rank,
            "parameters": sum(term.num_params for term in found),
        }
        if rank is not None and method not in RANKED:
            say(f"{method} is exact: the rank is {metrics['rank']}, not {rank}; svd recompresses to a rank.")
        record.write(place.path, metrics)
    return {"output": str(out), **metrics}


def _merger(method: str, options: Mapping[str, Any]) -> Callable[..., Pair]:
    if method not in MERGERS:
        raise unknown("method to combine adapters", method, MERGERS)
    parameters = inspect.signature(MERGERS[method]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    strange = sorted(set(options) - set(known))
    if strange:
        raise WeftError(
            f"The method {method!r} has no option {strange[0]!r}; its options: {', '.join(known) or 'none'}."
        )
    return MERGERS[method]


def _weights(adapters: Sequence[str | os.PathLike[str]], weights: Sequence[float] | None) -> list[float]:
    if isinstance(adapters, str | os.PathLike) or not len(adapters):
        raise WeftError(f"Give a list of adapter directories to combine, such as ['a/', 'b/'], not {adapters!r}.")
    for path in adapters:
        check_directory(path)
    amounts = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(amounts) != len(adapters):
        raise WeftError(f"There are {len(adapters)} adapters and {len(amounts)} weights; give one weight for each.")
    if not all(map(math.isfinite, amounts)):
        raise WeftError(f"The weights {amounts} are not all finite numbers; give one finite weight for each adapter.")
    return amounts


def common_base(paths: Sequence[str | os.PathLike[str]], loose: Sequence[LooseAdapter]) -> Base:
    """What all adapters tell of their base together. Raises WeftError where they tell of different ones."""
    whole = loose[0].base
    for path, other in zip(paths[1:], (one.base for one in loose[1:]), strict=True):
        differ = f"The adapters {paths[0]} and {path} were made on different bases"
        if whole.samples.keys() & other.samples.keys():
            changed = other_weights(whole.samples, other.samples)
            if changed is not None:
                raise WeftError(f"{differ}: their weights differ in {changed}; combine adapters of one base.")
        elif whole.name and other.name and whole.name.rstrip("/") != other.name.rstrip("/"):
            raise WeftError(
                f"{differ}: {whole.name} and {other.name}; if these are the same weights, give both one "
                "base_model_name_or_path in their adapter_config.json."
            )
        whole = Base(
            whole.name or other.name,
            whole.task or other.task,
            whole.transposed or other.transposed,
            tuple(sorted({*whole.targets, *other.targets})) if whole.targets and other.targets else (),
            {**other.samples, **whole.samples},
        )
    return whole


def _factors(path: str | os.PathLike[str], loose: LooseAdapter) -> dict[str, Pair]:
    """layer -> B (out, r), A (r, in) of the adapter's delta, in fp64 on the CPU. Raises WeftError where it has none."""
    along = next(iter(loose.adapter.extras), None)
    reason = why_not_peft(loose.adapter) if along is None else f"it trains parameters of the model itself too ({along})"
    pairs: dict[str, Pair] = {}
    for layer, terms in loose.adapter.terms.items():
        found = sum_factors(list(terms.values()))
        if reason or found is None:
            kinds = ", ".join(dict.fromkeys(term.kind for term in terms.values()))
            reason = reason or f"its delta on {layer} ({kinds}) is no product of two thin matrices"
            raise WeftError(
                f"{path} is a {loose.adapter.method} adapter and cannot be combined: {reason}; merge it into the "
                "model (weft merge) instead."
            )
        pairs[layer] = found[0].double(), found[1].double()
    return pairs


def common_pairs(
    paths: Sequence[str | os.PathLike[str]], loose: Sequence[LooseAdapter], weights: Sequence[float]
) -> dict[str, list[Pair]]:
    """layer -> the factors of each adapter that has it, weights folded into B."""
    pairs: dict[str, list[Pair]] = {}
    for path, one, weight in zip(paths, loose, weights, strict=True):
        for layer, (B, A) in _factors(path, one).items():
            others = pairs.setdefault(layer, [])
            if others and (len(others[0][0]), others[0][1].shape[1]) != (len(B), A.shape[1]):
                raise WeftError(
                    f"The adapters {paths[0]} and {path} were made on different bases: {layer} is "
                    f"{len(others[0][0])} x {others[0][1].shape[1]} in one and {len(B)} x {A.shape[1]} in the other."
                )
            others.append((weight * B, A))
    return pairs


def _rank(pairs: Mapping[str, Sequence[Pair]], rank: int | None, method: str) -> int:
    """The rank asked for, or the largest of the adapters' own."""
    if rank is None or method not in RANKED:
        return max(A.shape[0] for found in pairs.values() for _, A in found)
    most = max(sum(A.shape[0] for _, A in found) for found in pairs.values())
    if not 1 <= rank <= most:
        raise WeftError(
            f"Rank {rank} is not possible: the adapters have {most} components together; give 1 to {most}, or "
            "method='cat', which keeps them all."
        )
    return rank
