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

from weft.allocate.integer_program import choose
from weft.errors import WeftError, unknown
from weft.io.quantizer import mark
from weft.io.save import save_model
from weft.kernels.normal_float import NF4, Format
from weft.methods.adapter import scale_of
from weft.methods.base import Moments
from weft.methods.lq_lora import SHORT_GRID, decompose, fisher_roots
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve_device
from weft.runs.output import check_output, open_output
from weft.runs.record import begin
from weft.terms import Dense, Int8, LowRank, NormalFloat, SumLinear, Term
from weft.terms.adapters import Adapter, adapters_of, attach, unwrapped
from weft.terms.layers import bias_of, is_conv1d, replace
from weft.verbs.adapt import resolve_targets
from weft.verbs.evaluate import model_size

__all__ = ["SCHEMES", "choose_formats", "quantize", "run"]

SCHEMES: dict[str, Callable[[Tensor], Term]] = {
    "int8": Int8.from_matrix,
    **{f"nf{bits}": partial(NormalFloat.from_matrix, format=Format(bits)) for bits in (2, 3, 4, 8)},
}
"""What one matrix becomes; NormalFloats with double quantisation."""


def quantize(
    model: nn.Module,
    scheme: str = "nf4",
    targets: str | Sequence[str] = "all-linear",
    *,
    rank: int = 64,
    bits: float | None = None,
    alpha: float | None = None,
    formats: Sequence[Format] = SHORT_GRID,
    iterations: int = 5,
    stats: Mapping[str, Moments] | None = None,
    name: str = "default",
) -> nn.Module:
    """Replace dense weights by codes; the same model is returned, the weights themselves are gone.

    Args:
        scheme: "int8" (a scale a row), "nf2", "nf3", "nf4", "nf8" (block-wise, 64 weights a scale), or "lq-lora": codes
            and a low-rank adapter called `name` that takes up their error.
        targets: as in `weft.adapt`.
        rank, alpha, name: of the adapter, for "lq-lora"; the paper's rank is 64.
        bits: for "lq-lora", the mean bits a weight of the codes, spent where they help most among `formats`; None for
            NF4 everywhere. The adapter comes on top.
        formats: what an integer program may choose from.
        iterations: of the decomposition, at most.
        stats: with "fisher_rows" and "fisher_columns" of each layer, for the weighted form of "lq-lora".

    Raises:
        WeftError: an unknown scheme, targets that match nothing, an adapter that is on already, fewer bits than the
            smallest format has. The model is then as it was.
    """
    model = unwrapped(model)
    if scheme not in SCHEMES and scheme != "lq-lora":
        raise unknown("scheme of quantisation", scheme, [*SCHEMES, "lq-lora"])
    if adapters_of(model):
        on = ", ".join(adapters_of(model))
        raise WeftError(f"There are adapters on this model ({on}); quantise first, then put adapters on.")
    layers = {layer: m for layer, m in resolve_targets(model, targets).items() if _dense_terms(m)}
    if scheme == "lq-lora":
        _lq_lora(model, layers, rank, bits, alpha, formats, iterations, stats, name)
        return model
    for layer, module in layers.items():
        codes = {key: SCHEMES[scheme](matrix) for key, matrix in _dense_terms(module).items()}
        _put(model, layer, module, codes)
    return model


def run(
    model: str,
    out: str | Path,
    *,
    scheme: str | None = None,
    bits: float | None = None,
    targets: Sequence[str] | None = None,
    rank: int = 64,
    alpha: float | None = None,
    max_shard_size: str | int = "5GB",
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`weft quantize`: read a model, write it in codes, with `run.json` and a model card.

    Args:
        scheme: as in `quantize`; None for the NormalFloat of `bits`.
        bits: 2, 3, 4 or 8; for "lq-lora" the mean, a fraction too. None for 4, and for "lq-lora" NF4 everywhere.
        dtype: of what stays dense; None for the one it is stored in.

    Raises:
        WeftError: any argument that cannot work, before the model is loaded where it can be told.
    """
    arguments = {key: value for key, value in locals().items() if key != "device"}
    chosen = _scheme(scheme, bits)
    check_output(out, arguments)
    target = resolve_device(device)
    load_config(model, trust_remote_code=trust_remote_code)
    record = begin("quantize", arguments, device=target)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    source = load_model(model, device=target, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    before = model_size(source)
    # a part of the weight from now on, so not under the name that an adapter gets by default
    mean = {"bits": bits, "rank": rank, "alpha": alpha, "name": "low_rank"} if chosen == "lq-lora" else {}
    with open_output(out, arguments) as place:
        quantize(source, chosen, targets or "all-linear", **mean)  # type: ignore[arg-type]
        mark(source, chosen)
        metrics = {**_sizes(source), "bytes_before": before[1], "bytes": model_size(source)[1]}
        save_model(source, tokenizer, place.path, run=record.write(place.path, metrics), max_shard_size=max_shard_size)
    return {"output": str(out), **metrics}


def _scheme(scheme: str | None, bits: float | None) -> str:
    """The scheme that is meant, checked."""
    if scheme == "lq-lora":
        return scheme
    if scheme is not None and scheme not in SCHEMES:
        raise unknown("scheme of quantisation", scheme, [*SCHEMES, "lq-lora"])
    widths = {name.lstrip("inft"): name for name in SCHEMES if name.startswith("nf")}
    if scheme is None and bits is not None and f"{bits:g}" not in widths:
        raise WeftError(f"{bits:g} bits are not possible; give 2, 3, 4 or 8, or a mean with --scheme lq-lora.")
    if scheme is not None and bits is not None and not scheme.endswith(f"{bits:g}"):
        raise WeftError(f"--scheme {scheme} has its own number of bits, not {bits:g}; give one of the two.")
    return scheme or ("nf4" if bits is None else widths[f"{bits:g}"])


def _sizes(model: nn.Module) -> dict[str, Any]:
    """How many matrices are in code, and what a weight of theirs takes, the low-rank terms apart."""
    sums = [m for m in model.modules() if isinstance(m, SumLinear)]
    codes = [term for layer in sums for term in layer._terms() if isinstance(term, Int8 | NormalFloat)]
    weights = sum(term.in_features * term.out_features for term in codes)
    bits = 8 * sum(term.nbytes for term in codes)
    return {"matrices": len(codes), "bits_per_weight": bits / max(weights, 1)}


def choose_formats(
    weights: Mapping[str, Tensor],
    rank: int,
    bits: float,
    formats: Sequence[Format] = SHORT_GRID,
    roots: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Format]:
    """The format of each matrix with the least total squared error at `bits` a weight in the mean.

    A format's error is that of the first iterate, whose factors all formats share.
    """
    errors = []
    for layer, W in weights.items():
        start, pair = None, (roots or {}).get(layer)
        row = []
        for format in formats:
            found = decompose(W, rank, format, weights=pair, iterations=1, start=start)
            start = found.B, found.A
            row.append(found.error**2)
        errors.append(row)
    # with sizes in bits the paper's normalisation is not needed
    count = torch.tensor([W.numel() for W in weights.values()], dtype=torch.float64)
    widths = torch.tensor([format.bits_per_weight for format in formats], dtype=torch.float64)
    chosen = choose(torch.tensor(errors), count.unsqueeze(1) * widths, bits * float(count.sum()))
    return {layer: formats[option] for layer, option in zip(weights, chosen, strict=True)}


def _lq_lora(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rank: int,
    bits: float | None,
    alpha: float | None,
    formats: Sequence[Format],
    iterations: int,
    stats: Mapping[str, Moments] | None,
    name: str,
) -> None:
    weights = {layer: sum(_dense_terms(m).values(), start=torch.zeros(())) for layer, m in layers.items()}
    for layer, W in weights.items():
        if not 1 <= rank <= min(W.shape):
            raise WeftError(f"Rank {rank} is not possible on {layer} {tuple(W.shape)}; give 1 to {min(W.shape)}.")
    needed = {"fisher_rows", "fisher_columns"}
    lacking = [layer for layer in layers if stats is not None and not needed <= stats.get(layer, {}).keys()]
    if lacking:
        raise WeftError(
            f"The statistics of {lacking[0]} lack fisher_rows and fisher_columns; calibrate with these needs."
        )
    roots = {layer: fisher_roots(stats[layer]) for layer in layers} if stats is not None else {}
    least = min(format.bits_per_weight for format in formats)
    if bits is not None and bits < least:
        raise WeftError(f"{bits:g} bits a weight are fewer than the smallest format has; give at least {least:.3f}.")
    plan = dict.fromkeys(layers, NF4) if bits is None else choose_formats(weights, rank, bits, formats, roots)
    terms: dict[str, dict[str, Term]] = {}
    for layer, module in layers.items():
        found = decompose(weights[layer], rank, plan[layer], weights=roots.get(layer), iterations=iterations)
        scale = scale_of(rank, alpha=alpha)
        B, A = found.B / scale**0.5, found.A / scale**0.5
        terms[layer] = {name: LowRank.from_factors(B, A, scale=scale)}
        _put(model, layer, module, {"base": found.code.to(weights[layer].dtype)})
    settings = {"rank": rank, "options": {"alpha": alpha}, "formats": {layer: f._asdict() for layer, f in plan.items()}}
    attach(model, Adapter(name, "lq-lora", terms, settings=settings))


def _dense_terms(module: nn.Module) -> dict[str, Tensor]:
    """The dense matrices (out, in) of a layer by the name of their term."""
    if isinstance(module, SumLinear):
        return {key: term.matrix.detach() for key, term in module._named_terms() if isinstance(term, Dense)}
    weight: Tensor = module.weight.detach()  # type: ignore[operator, assignment]
    return {"base": weight.mT if is_conv1d(module) else weight}


def _put(model: nn.Module, layer: str, module: nn.Module, codes: Mapping[str, Term]) -> None:
    """Set codes in the place of the layer's dense terms."""
    if isinstance(module, SumLinear):
        others = {key: term for key, term in module._named_terms() if not isinstance(term, Dense)}
        module.terms = nn.ModuleDict({**codes, **others})
        return
    made = SumLinear(codes, bias_of(module), transposed=is_conv1d(module)).requires_grad_(False)
    replace(model, layer, made)
