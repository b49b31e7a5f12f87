"""weft.quantize: put codes of few bits in the place of a model's dense weights; QLoRA is this, then `weft.adapt`.

weft quantize MODEL -o OUT --bits 4          the same on a directory, which transformers opens after `import weft`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.allocate import Shape
from weft.errors import WeftError, unknown
from weft.io.quantizer import mark, remark
from weft.io.save import save_model
from weft.kernels.normal_float import NF4, Format
from weft.methods import METHODS, Method, Site, Split
from weft.methods.base import Moments
from weft.methods.lq_lora import SHORT_GRID, choose_formats, fisher_roots
from weft.methods.normal_float import WIDTHS
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve_device
from weft.runs.output import check_output, open_output
from weft.runs.pieces import Store, packed, unpacked
from weft.runs.record import begin
from weft.seeds import generator
from weft.signals import finishing
from weft.stats.cache import fingerprint
from weft.terms import Dense, SumLinear, Term
from weft.terms.adapters import Adapter, adapters_of, attach, unwrapped
from weft.terms.coded_embedding import check_width, code_embeddings
from weft.terms.coverage import Coverage, coverage
from weft.terms.experts import within_experts
from weft.terms.layers import is_conv1d, linear_layers
from weft.terms.put import put
from weft.terms.quantized import Quantized
from weft.verbs.evaluate import model_size
from weft.verbs.survey import check_weight
from weft.verbs.targets import resolve_targets

__all__ = ["quantize", "run", "schemes"]

RANK = 64  # of the low-rank term, as published


def schemes() -> dict[str, Method]:
    """What `quantize` puts in a weight's place: the methods of kind "quantize" that ask for no data, and
    adapters found with their base.
    """
    return {
        name: method
        for name, method in METHODS.items()
        if method.replaces or (method.kind == "quantize" and not method.needs)
    }


@within_experts
def quantize(
    model: nn.Module,
    scheme: str | Method = "nf4",
    targets: str | Sequence[str] = "all-linear",
    *,
    rank: int = RANK,
    bits: float | None = None,
    alpha: float | None = None,
    formats: Sequence[Format] = SHORT_GRID,
    iterations: int = 5,
    stats: Mapping[str, Moments] | None = None,
    name: str = "default",
    progress: Store | None = None,
) -> nn.Module:
    """Replace dense weights by codes; the same model is returned, the weights themselves are gone.

    Args:
        scheme: a method of kind "quantize" ("int8": a scale a row; "nf2", "nf3", "nf4", "nf8", "rtn": 64 weights a
            scale), or "lq-lora": codes and a low-rank adapter called `name` that takes up their error.
        targets: as in `weft.adapt`.
        rank, alpha, name: of the adapter, for "lq-lora"; the paper's rank is 64.
        bits: of a scheme of several widths, None for 4; of others their own; for "lq-lora", the mean bits a weight of
            the codes, spent where they help most among `formats`, None for NF4 everywhere. The adapter comes on top.
        formats: what an integer program may choose from.
        iterations: of the decomposition, at most.
        stats: with "fisher_rows" and "fisher_columns" of each layer, for the weighted form of "lq-lora".
        progress: keeps the finished layers of "lq-lora", from which an interrupted call goes on.

    Raises:
        WeftError: an unknown scheme, targets that match nothing, an adapter that is on already, fewer bits than the
            smallest format has. The model is then as it was.

    Example:
        >>> model = weft.quantize(model, "nf4")
        >>> model.save_pretrained("small/")
    """
    model = unwrapped(model)
    method = scheme if isinstance(scheme, Method) else _find(scheme)
    _check_beside(method, rank, alpha)
    if adapters_of(model):
        on = ", ".join(adapters_of(model))
        raise WeftError(f"There are adapters on this model ({on}); quantise first, then put adapters on.")
    layers = {layer: m for layer, m in resolve_targets(model, targets).items() if _dense_terms(m)}
    if not layers:
        raise WeftError(
            "Every matrix that these targets name is in codes or factors already; quantise the model that it was made "
            "of, or make plain weights of it first: weft merge."
        )
    for layer, module in layers.items():
        for matrix in _dense_terms(module).values():
            check_weight(layer, matrix)
    if method.replaces:
        options, store = method.options({"alpha": alpha, "iterations": iterations}), progress or Store()
        plan = _formats(layers, rank, bits, formats, stats, store)
        _with_adapter(model, layers, method, rank, options, plan, stats, name, store)
    else:
        for layer, module in layers.items():
            _put(model, layer, module, _codes(method, layer, module, bits))
    remark(model)
    return model


def _find(scheme: str) -> Method:
    if (known := METHODS.known(scheme)) and known.kind == "quantize" and known.needs:
        raise WeftError(f"{scheme} looks at calibration text: use weft compress MODEL --method {scheme}.")
    if scheme not in schemes():
        raise unknown("scheme of quantisation", scheme, schemes())
    return schemes()[scheme]


def _check_beside(method: Method, rank: int, alpha: float | None) -> None:
    """Raises WeftError where a low-rank term is described, and the scheme has none."""
    if not method.replaces and (rank != RANK or alpha is not None):
        raise WeftError(
            f"{method.name} has no low-rank term for a rank or alpha: leave them out, or give the scheme lq-lora."
        )


def _codes(method: Method, layer: str, module: nn.Module, bits: float | None) -> dict[str, Term]:
    """The codes of a layer's dense terms, by the name of the term.

    Raises:
        WeftError: `bits` is none of the method's sizes.
    """
    assert method.split is not None
    made: dict[str, Term] = {}
    for key, matrix in _dense_terms(module).items():
        out, inn = matrix.shape
        sizes = [size for size, _ in method.sizes(Shape(out, inn, matrix.element_size()), method.options({}))]
        asked = bits or (sizes[0] if len(sizes) == 1 else 4)
        wanted = [size for size in sizes if size == asked]
        if not wanted:
            raise WeftError(
                f"{method.name} has {', '.join(map(str, sizes))} bits, not {asked:g}; give one of them as bits=."
            )
        site = _site(method, layer, {"base": Dense.from_matrix(matrix)}, wanted[0], {}, matrix.dtype)
        (made[key],) = method.split(site, **method.options({})).terms.values()
    return made


def run(
    model: str,
    out: str | Path,
    *,
    scheme: str | None = None,
    bits: float | None = None,
    targets: Sequence[str] | None = None,
    rank: int = RANK,
    alpha: float | None = None,
    embeddings: str | None = None,
    max_shard_size: str | int = "5GB",
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`weft quantize`: read a model, write it in codes, with `run.json` and a model card. An interrupted run keeps the
    finished layers of "lq-lora" beside `out` and goes on from them.

    Args:
        scheme: as in `quantize`; None for the NormalFloat of `bits`.
        bits: 2, 3, 4 or 8; for "lq-lora" the mean, a fraction too. None for 4, and for "lq-lora" NF4 everywhere.
        embeddings: "8bit" for the embedding and the head in codes too.
        dtype: of what stays dense; None for the one it is stored in.

    Raises:
        WeftError: any argument that cannot work, before the model is loaded where it can be told.
    """
    arguments = {key: value for key, value in locals().items() if key != "device"}
    chosen = _scheme(scheme, bits)
    _check_beside(METHODS[chosen], rank, alpha)
    check_width(embeddings)
    check_output(out, arguments)
    target = resolve_device(device)
    load_config(model, trust_remote_code=trust_remote_code)
    record = begin("quantize", arguments, device=target)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    source = load_model(model, device=target, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    before = model_size(source)
    # a part of the weight from now on, so not under the name that an adapter gets by default
    mean = {"bits": bits, "rank": rank, "alpha": alpha, "name": "low_rank"}
    if embeddings is not None:
        code_embeddings(source)
    with open_output(out, arguments) as place:
        store = None
        if METHODS[chosen].replaces:
            store = Store(place.progress, fingerprint(source, (), (), linear_layers(source)))
        quantize(source, chosen, targets or "all-linear", progress=store, **mean)  # type: ignore[arg-type]
        mark(source, chosen)
        metrics = {**_sizes(source), "bytes_before": before[1], "bytes": model_size(source)[1]}
        metrics |= _covered(source).facts()
        save_model(source, tokenizer, place.path, run=record.write(place.path, metrics), max_shard_size=max_shard_size)
    return {"output": str(out), **metrics}


def _scheme(scheme: str | None, bits: float | None) -> str:
    """The scheme that is meant, checked."""
    if scheme is None and bits is None:
        return "nf4"
    if scheme is None:
        if bits not in WIDTHS:
            raise WeftError(f"{bits:g} bits are not possible; give 2, 3, 4 or 8, or a mean with --scheme lq-lora.")
        return f"nf{bits:g}"
    method = _find(scheme)
    sizes = [size for size, _ in method.sizes(Shape(64, 64), method.options({}))]
    if bits is not None and not method.replaces and bits not in sizes:
        raise WeftError(f"--scheme {scheme} has {', '.join(map(str, sizes))} bits, not {bits:g}; give one of these.")
    return scheme


def _covered(model: nn.Module) -> Coverage:
    """What is in codes now; of what is not, factors are left as they are."""
    sums = {name: layer for name, layer in model.named_modules() if isinstance(layer, SumLinear)}
    coded = [name for name, layer in sums.items() if any(isinstance(term, Quantized) for term in layer._terms())]
    found = coverage(model, coded)
    left = {name: "it is in factors already" if name in sums else why for name, why in found.left.items()}
    return Coverage(found.share, left)


def _sizes(model: nn.Module) -> dict[str, Any]:
    """How many matrices are in code, and what a weight of theirs takes, the low-rank terms apart."""
    sums = [m for m in model.modules() if isinstance(m, SumLinear)]
    codes = [term for layer in sums for term in layer._terms() if isinstance(term, Quantized)]
    weights = sum(term.in_features * term.out_features for term in codes)
    bits = 8 * sum(term.nbytes for term in codes)
    return {"matrices": len(codes), "bits_per_weight": bits / max(weights, 1)}


def _with_adapter(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    method: Method,
    rank: int,
    options: Mapping[str, Any],
    plan: Mapping[str, Format],
    stats: Mapping[str, Moments] | None,
    name: str,
    store: Store,
) -> None:
    """Codes in the place of the weights, and the low-rank terms found with them as an adapter."""
    assert method.split is not None
    terms: dict[str, dict[str, Term]] = {}
    for layer, module in layers.items():
        W = _whole(module)
        site = _site(method, layer, {"base": Dense.from_matrix(W)}, rank, (stats or {}).get(layer, {}), torch.float32)
        made = _once(store, layer, module, partial(method.split, site, **{**options, **plan[layer]._asdict()}))
        _put(model, layer, module, {"base": made.pop("base").to(W.dtype)})
        terms[layer] = {name: made.pop("")}
    settings = {
        "rank": rank,
        "options": {"alpha": options["alpha"]},
        "formats": {layer: format._asdict() for layer, format in plan.items()},
    }
    attach(model, Adapter(name, method.name, terms, settings=settings))


def _once(store: Store, layer: str, module: nn.Module, make: Callable[[], Split]) -> dict[str, Term]:
    """The terms of a layer; where they are not finished they are made, and kept."""
    piece = store.get(layer)
    if piece is not None:
        return unpacked(piece, layer, module)[0]
    with finishing():
        terms = dict(make().terms)
        store.put(layer, packed(layer, terms, None))
    return terms


def _formats(
    layers: Mapping[str, nn.Module],
    rank: int,
    bits: float | None,
    formats: Sequence[Format],
    stats: Mapping[str, Moments] | None,
    store: Store,
) -> dict[str, Format]:
    """The format of each layer, checked: NF4, or what an integer program chooses at a mean number of bits."""
    weights = {layer: _whole(module) for layer, module in layers.items()}
    for layer, W in weights.items():
        if not 1 <= rank <= min(W.shape):
            raise WeftError(
                f"Rank {rank} is not possible on {layer} {tuple(W.shape)}; give 1 to {min(W.shape)}, or leave the "
                "layer out by the targets."
            )
    needed = {"fisher_rows", "fisher_columns"}
    lacking = [layer for layer in layers if stats is not None and not needed <= stats.get(layer, {}).keys()]
    if lacking:
        raise WeftError(
            f"The statistics of {lacking[0]} lack fisher_rows and fisher_columns; calibrate with these needs."
        )
    least = min(format.bits_per_weight for format in formats)
    if bits is None:
        return dict.fromkeys(layers, NF4)
    if bits < least:
        raise WeftError(f"{bits:g} bits a weight are fewer than the smallest format has; give at least {least:.3f}.")
    roots = {layer: fisher_roots(stats[layer]) for layer in layers} if stats is not None else {}
    return choose_formats(weights, rank, bits, formats, roots, store.once)


def _site(
    method: Method, layer: str, terms: Mapping[str, Term], size: Any, moments: Moments, dtype: torch.dtype
) -> Site:
    return Site(layer, terms, size, size, moments, generator(0, method.name, layer), dtype)


def _whole(module: nn.Module) -> Tensor:
    return sum(_dense_terms(module).values(), start=torch.zeros(()))


def _dense_terms(module: nn.Module) -> dict[str, Tensor]:
    """The dense matrices (out, in) of a layer by the name of their term."""
    if isinstance(module, SumLinear):
        return {key: term.matrix.detach() for key, term in module._named_terms() if isinstance(term, Dense)}
    weight: Tensor = module.weight.detach()  # type: ignore[operator, assignment]
    return {"base": weight.mT if is_conv1d(module) else weight}


def _put(model: nn.Module, layer: str, module: nn.Module, codes: Mapping[str, Term]) -> None:
    """Set codes in the place of the layer's dense terms."""
    terms = dict(module._named_terms()) if isinstance(module, SumLinear) else {}
    others = {key: term for key, term in terms.items() if not isinstance(term, Dense)}
    made = put(model, layer, {**codes, **others})
    if not terms:
        made.requires_grad_(False)
