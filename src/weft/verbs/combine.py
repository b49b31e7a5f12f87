"""Combine: several low-rank adapters of one base become one adapter, without the base model.

    weft.combine(["a/", "b/"], method="lego", rank=16, weights=[1.0, 0.5], out="ab/")

The methods are the pages of `weft.merging`. Weights are 1 where none are given: the sum, as adapters in use on one
model add up. [1/n, ...] is their mean.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weft.errors import WeftError
from weft.io.adapter_places import check_terms
from weft.io.adapters import LooseAdapter, read_adapter
from weft.io.base import Base, other_weights
from weft.io.peft import why_not_peft
from weft.merging import MERGERS, Merger, Pair
from weft.merging.sums import LINEAR
from weft.methods import lora
from weft.progress import say
from weft.runs.output import check_output, open_output
from weft.runs.record import begin
from weft.seeds import check_seed, generator
from weft.terms import LowRank, Term
from weft.terms.adapters import Adapter
from weft.terms.factors import sum_factors

__all__ = ["combine", "common_base", "common_pairs", "run"]

DEFAULT = LINEAR.name


@torch.no_grad()
def combine(
    adapters: Sequence[str | os.PathLike[str]],
    method: str | Merger = DEFAULT,
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
        method: of kind "merge": its name or its record.
        rank: of the result, for the methods that are `ranked`; None for the largest of the adapters' ranks. That of the
            others follows from the adapters.
        weights: one for each adapter; a negative one takes it away.
        out: also write the result there, for weft and for PEFT.
        seed: of what a method draws.
        **options: the method's own, see its defaults.

    Raises:
        WeftError: no adapters, or what is none; a delta that is no product of thin matrices (DoRA and the like);
            adapters of different bases; weights of another number; a rank above all ranks together; an unknown method
            or option; `out` is not empty. Nothing is then written.

    Example:
        >>> for name in ("one", "two"):
        ...     weft.save_adapter(weft.adapt(model, "lora", rank=4, name=name), name, name)
        >>> both = weft.combine(["one", "two"], "svd", rank=4, weights=[0.7, 0.3])
    """
    merger = MERGERS.find(method, "merge")
    options, amounts = merger.options(options), _weights(adapters, weights, merger)
    if out is not None:
        check_output(out, {})
    loose = [read_adapter(path) for path in adapters]
    base = common_base(adapters, loose)
    pairs = common_pairs(adapters, loose, amounts)
    chosen = _rank(pairs, rank, merger)
    terms: dict[str, dict[str, Term]] = {}
    assert merger.merge is not None
    for layer, found in pairs.items():
        present = found if merger.takes else [pair for pair in found if pair[1].shape[0]]
        k = min(chosen, sum(A.shape[0] for _, A in present))
        B, A = merger.merge(present, k, generator(check_seed(seed), merger.name, layer), **options)
        if len(A):
            terms[layer] = {"combined": LowRank.from_factors(B.float(), A.float())}
    made = LooseAdapter(Adapter("combined", lora.METHOD.name, terms), base)
    record = {"method": merger.name, "weights": amounts, "seed": seed, "options": options}
    made.adapter.settings.update(rank=made.rank, combined=record)
    if out is not None:
        made.save(out)
    return made


def run(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | Path,
    *,
    method: str = DEFAULT,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """`weft combine`: the same on paths, with `run.json`. Raises WeftError as `combine` does."""
    arguments = {key: value for key, value in locals().items() if key != "options"} | options
    check_output(out, arguments)
    merger = MERGERS.find(method, "merge")
    merger.options(options)
    _weights(adapters, weights, merger)
    record = begin("combine", arguments, seed=check_seed(seed))
    with open_output(out, arguments) as place:
        made = combine(adapters, method, rank, weights, out=place.path, seed=seed, **options)
        found = made.adapter.all_terms()
        metrics = {
            "layers": len(found),
            "rank": made.rank,
            "parameters": sum(term.num_params for term in found),
        }
        if rank is not None and not merger.ranked:
            say(f"{method} is exact: the rank is {metrics['rank']}, not {rank}; svd recompresses to a rank.")
        record.write(place.path, metrics)
    return {"output": str(out), **metrics}


def _weights(
    adapters: Sequence[str | os.PathLike[str]], weights: Sequence[float] | None, merger: Merger
) -> list[float]:
    if isinstance(adapters, str | os.PathLike) or not len(adapters):
        raise WeftError(f"Give a list of adapter directories to combine, such as ['a/', 'b/'], not {adapters!r}.")
    if merger.takes not in (None, len(adapters)):
        raise WeftError(f"{merger.name!r} takes {merger.takes} adapters, in their order, and not {len(adapters)}.")
    for path in adapters:
        check_terms(path)
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
    """layer -> the factors of every adapter, weights folded into B; of rank 0 where it lacks the layer."""
    factors = [_factors(path, one) for path, one in zip(paths, loose, strict=True)]
    pairs: dict[str, list[Pair]] = {}
    for layer in dict.fromkeys(layer for found in factors for layer in found):
        (first, (B, A)), *others = [(path, f[layer]) for path, f in zip(paths, factors, strict=True) if layer in f]
        for path, (B_j, A_j) in others:
            if (len(B), A.shape[1]) != (len(B_j), A_j.shape[1]):
                raise WeftError(
                    f"The adapters {first} and {path} were made on different bases: {layer} is "
                    f"{len(B)} x {A.shape[1]} in one and {len(B_j)} x {A_j.shape[1]} in the other."
                )
        ours = [f.get(layer, (B[:, :0], A[:0])) for f in factors]
        pairs[layer] = [(weight * B_j, A_j) for weight, (B_j, A_j) in zip(weights, ours, strict=True)]
    return pairs


def _rank(pairs: Mapping[str, Sequence[Pair]], rank: int | None, merger: Merger) -> int:
    """The rank asked for, or the largest of the adapters' own."""
    if rank is None or not merger.ranked:
        return max(A.shape[0] for found in pairs.values() for _, A in found)
    most = max(sum(A.shape[0] for _, A in found) for found in pairs.values())
    if not 1 <= rank <= most:
        raise WeftError(
            f"Rank {rank} is not possible: the adapters have {most} components together; give 1 to {most}, or "
            "method='cat', which keeps them all."
        )
    return rank
