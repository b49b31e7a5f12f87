"""weft.quantize: put codes of few bits in the place of a model's dense weights; QLoRA is this, then `weft.adapt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from weft.allocate.integer_program import choose
from weft.errors import WeftError, unknown
from weft.kernels.normal_float import NF4, Format
from weft.methods.adapter import scale_of
from weft.methods.base import Moments
from weft.methods.lq_lora import SHORT_GRID, decompose, fisher_roots
from weft.terms import Dense, Int8, LowRank, NormalFloat, SumLinear, Term
from weft.terms.adapters import Adapter, adapters_of, attach, unwrapped
from weft.terms.layers import bias_of, is_conv1d, replace
from weft.verbs.adapt import resolve_targets

__all__ = ["SCHEMES", "choose_formats", "quantize"]

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
