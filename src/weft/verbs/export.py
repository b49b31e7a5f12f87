"""Export: write a model in a format that servers and tools read, exactly, or say why it cannot be.

    weft.export(model, "served/", "compressed-tensors", tokenizer=tokenizer)

A layer in integer codes stays in them; low-rank terms beside the codes become an adapter inside the output, PEFT's in
`peft/` or, of GGUF, its own; every other sum of terms becomes one dense matrix. All layers are looked at before
anything is written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.files import write_json
from weft.io.adapters import LooseAdapter
from weft.io.base import base_of
from weft.io.cards import export_card
from weft.io.formats import Coded, Export, Format, Stored, coded_layers, find_format
from weft.io.formats.gguf_lora import factors_of
from weft.io.plain import Room, check_matrices, made_room, room_for_biases
from weft.io.precision import as_stored
from weft.io.quantizer import marked_as
from weft.io.save import write_companions
from weft.progress import say
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_dtype
from weft.runs.output import check_output, open_output
from weft.runs.record import Result, Run, begin
from weft.terms import SumLinear, Term
from weft.terms.adapters import Adapter, adapters_of
from weft.terms.coded_embedding import embedding_specs, plain_embeddings
from weft.terms.coverage import coverage_of
from weft.terms.experts import names_an_expert
from weft.terms.hooks import check_at_hand
from weft.terms.quantized import Quantized
from weft.verbs.adapters import check_ungrafted

__all__ = ["export", "run"]

ADAPTER = "peft"
"""The directory of the adapter inside the output."""
_WEIGHTS = (".safetensors", ".gguf")


@torch.no_grad()
def export(
    model: PreTrainedModel,
    directory: str | Path,
    format: str = "hf",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write the model into a new directory; the model itself stays as it is.

    Args:
        format: "compressed-tensors", "gptq", "gguf" or "hf" (a plain dense model).
        dtype: of the floating-point tensors; None for the stored one, or fp16 or fp32 where that does not hold the
            scales of the codes exactly.

    Returns: JSON-able: format, dtype, coded (layers in codes), dense (sums written as one matrix), adapter (layers of
    the PEFT adapter beside them), bytes (of all files of weights).

    Raises:
        WeftError: the format cannot hold a layer exactly, with its name and the reason, before anything is written; or
            the directory is not empty.

    Example:
        >>> done = weft.compress(model, "svd", budget=0.6)
        >>> weft.export(model, "plain/", "hf")["coded"]
        0
    """
    out = Path(directory)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise WeftError(f"The directory {out} is not empty; choose another one, or remove it first.")
    arguments = {"model": model.name_or_path, "format": format}
    check_ungrafted(model)
    if embedding_specs(model):
        raise WeftError("The embedding is in codes, which no format holds; export the directory by weft export.")
    plan = _plan(model, find_format(format), tokenizer, dtype)
    with open_output(out, arguments) as place:
        return Result(_write(model, plan, place.path, out, tokenizer, begin("export", arguments)))


def run(
    model: str,
    out: str | Path,
    *,
    format: str = "hf",
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`weft export`: read a model, write it in another format, with `run.json` and a model card.

    Raises:
        WeftError: as `export` does, and for any other argument that cannot work, before the model is loaded where it
            can be told.
    """
    arguments = {key: value for key, value in locals().items() if key != "device"}
    wanted = find_format(format)
    check_output(out, arguments)
    _check_package(wanted)
    target = resolve_device(device)
    given = resolve_dtype(dtype or "auto", target)
    config = load_config(model, trust_remote_code=trust_remote_code)
    wanted.check(next(iter(config.architectures or []), "AutoModelForCausalLM"), config)
    record = begin("export", arguments, device=target)
    tokenizer = _tokenizer(model, trust_remote_code)
    source = load_model(model, device=target, dtype="auto", trust_remote_code=trust_remote_code)
    check_ungrafted(source)
    if plain_embeddings(source):
        say("The embedding and the head, in codes here, are written dense: no such format holds them.")
    with torch.no_grad():
        plan = _plan(source, wanted, tokenizer, given)
        with open_output(out, arguments) as place:
            done = _write(source, plan, place.path, Path(out), tokenizer, record)
    return {"output": str(out), **done}


@dataclass(frozen=True)
class _Plan:
    """What will be written, checked: the layers in codes, the sums that become one matrix, and the dtype."""

    format: Format
    layers: Mapping[str, Coded]
    dense: list[str]
    dtype: torch.dtype
    beside: Mapping[str, Mapping[str, Term]]
    """Low-rank terms by layer, which are written as an adapter."""
    room: Room = field(default_factory=Room)
    """What the plain layers need for their biases."""


def _plan(
    model: PreTrainedModel, format: Format, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None
) -> _Plan:
    """Raises WeftError where anything of the model has no exact place in the format."""
    _check_package(format)
    format.check(type(model).__name__, model.config)
    if tokenizer is not None:
        format.check_tokenizer(tokenizer)
    sums = [name for name, module in model.named_modules() if isinstance(module, SumLinear)]
    expert = next(filter(names_an_expert, sums), None)
    if expert is not None:
        raise WeftError(
            f"{expert} is an expert of a mixture, whose tensors hold all experts together and have no place for codes "
            "or sums of single ones; weft merge writes the plain model."
        )
    check_at_hand(model, sums)
    if format.adapter is not None:
        return _Plan(format, {}, [], _dtype(model, format, {}, dtype), _low_rank(model))
    check_matrices(model, sums)
    room = room_for_biases(model)
    format.check(type(model).__name__, room.configured(model.config))
    layers = {} if format.unfit is None else coded_layers(model, format.floats)
    if format.codes_only and not layers:
        raise WeftError(
            f"No layer of this model is in {f'codes of {format.name}' if format.floats else 'integer codes'}"
            f"{_kinds(model, sums)}; --format hf writes it dense.{_way_to_integers(model, sums)}"
        )
    chosen, dense = _dtype(model, format, layers, dtype), [name for name in sums if name not in layers]
    if format.unfit is not None:
        _tell_of_other_codes(model, format, dense)
    return _Plan(format, layers, dense, chosen, _beside(layers), room)


def _tell_of_other_codes(model: PreTrainedModel, format: Format, dense: list[str]) -> None:
    """Say which layers, in codes now, will not be."""
    others = _in_codes(model, dense)
    if others:
        say(
            f"Written dense, since {format.name} does not have their codes{_kinds(model, others)}: {len(others)} of "
            f"the layers.{_way_to_integers(model, others)}"
        )


def _in_codes(model: nn.Module, names: list[str]) -> list[str]:
    """Those of these sums with codes of any sort, within another term too (DoRA's)."""
    return [n for n in names if any(isinstance(module, Quantized) for module in model.get_submodule(n).modules())]


def _way_to_integers(model: nn.Module, names: list[str]) -> str:
    """A further sentence on what leaves these sums in integer codes; nothing where none is in codes of another sort."""
    if not any(isinstance(term, Quantized) for name in names for term in _terms(model, name)):
        return ""
    return (
        " `weft compress --method auto --option methods=yaqa:clip=true` has integer codes alone, and so has `--method "
        "yaqa` without table=true."
    )


def _terms(model: nn.Module, name: str) -> list[Term]:
    layer = model.get_submodule(name)
    assert isinstance(layer, SumLinear)
    return list(layer._terms())


def _beside(layers: Mapping[str, Coded]) -> dict[str, Mapping[str, Term]]:
    return {name: layer.beside for name, layer in layers.items() if layer.beside}


def _low_rank(model: PreTrainedModel) -> dict[str, Mapping[str, Term]]:
    """The terms by layer of the adapters in use; without one, the factors beside codes."""
    found: dict[str, dict[str, Term]] = {}
    for adapter in adapters_of(model).values():
        if adapter.extras:
            raise WeftError(f"The adapter {adapter.name!r} brings {next(iter(adapter.extras))}, which no LoRA holds.")
        for layer, terms in adapter.terms.items() if adapter.active else ():
            found.setdefault(layer, {}).update(terms)
    beside = found or _beside(coded_layers(model))
    if not beside:
        raise WeftError("This model has no adapter; give the directory of one that weft or PEFT wrote.")
    for layer, own in beside.items():
        factors_of(layer, own)  # which says what is no LoRA
    return dict(beside)


def _kinds(model: nn.Module, sums: list[str]) -> str:
    if not sums:
        return ""
    return f" ({sums[0]} is a sum of {', '.join(term.kind for term in _terms(model, sums[0]))})"


def _dtype(
    model: PreTrainedModel, format: Format, layers: Mapping[str, Coded], given: torch.dtype | None
) -> torch.dtype:
    """The dtype asked for, or the first in which every layer's codes are exact."""
    if given is not None and format.dtypes and given not in format.dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in format.dtypes)
        what = "model" if format.adapter is None else "file"
        raise WeftError(f"A {format.name} {what} is stored in {names}, not in {str(given).removeprefix('torch.')}.")
    with as_stored(model):
        stored = model.dtype
    usual = [stored, *(format.dtypes or (torch.float16, torch.float32))]
    tried = [given] if given is not None else [d for d in usual if d in (format.dtypes or usual)]
    reasons = [_misfit(format, layers, dtype) for dtype in tried]
    fit = next((dtype for dtype, reason in zip(tried, reasons, strict=True) if reason is None), None)
    if fit is None:  # the reason that no dtype mends
        raise WeftError(f"{reasons[-1]}, so that {format.name} cannot hold it exactly; --format hf writes it dense.")
    if layers and fit != stored and given is None:
        say(f"The dense tensors are written in {fit}: {format.name} does not hold the scales of the codes in {stored}.")
    return fit


def _misfit(format: Format, layers: Mapping[str, Coded], dtype: torch.dtype) -> str | None:
    """The first layer that has no exact form, with the reason."""
    for name, layer in layers.items():
        assert format.unfit is not None
        reason = "it stands for a Conv1D" if layer.transposed else format.unfit(layer.codes, dtype)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _write(
    model: PreTrainedModel,
    plan: _Plan,
    path: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    record: Run,
) -> dict[str, Any]:
    """Write the files into `path`, which will be `out`."""
    format = plan.format
    metrics: dict[str, Any] = {
        "format": format.name,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "coded": len(plan.layers),
        "dense": len(plan.dense),
        "adapter": len(plan.beside),
    }
    own = {*plan.layers, *plan.dense, *plan.beside}
    metrics |= coverage_of(model, own).facts() if own else {}  # a plain model is written as it is
    _write_adapter(model, plan, path, out)
    config = None if format.adapter is not None else _write_model(model, plan, path, tokenizer)
    for name, value in format.files(config or {}).items():
        write_json(path / name, value)
    metrics["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.suffix in _WEIGHTS)
    caution, usage = format.caution(plan.layers), format.usage
    if plan.beside and format.adapter is None:
        usage = format.with_adapter
        say(f"{len(plan.beside)} layers have factors beside their codes: the model is this with the adapter beside it.")
    if caution:
        say(caution)
        usage += f"\n\n{caution}"
    card = export_card(model, record.write(path, metrics), format.name, format.library, usage)
    (path / "README.md").write_text(card, encoding="utf-8")
    return metrics


def _write_model(
    model: PreTrainedModel, plan: _Plan, path: Path, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any] | None:
    """The model itself; returns its quantization_config."""
    with _standing_in(model, plan), as_stored(model, plan.dtype):
        _check_range(model, plan)
        made = Export(model, plan.layers, plan.dtype, tokenizer)
        config = plan.format.config(made)
        with marked_as(model, config):
            if plan.format.write is None:
                model.save_pretrained(path)
                write_companions(model, tokenizer, path)
            else:
                plan.format.write(made, path)
    return config


def _check_range(model: PreTrainedModel, plan: _Plan) -> None:
    """Raises WeftError where a number of the model became infinite in the dtype that it is written in."""
    held = model.state_dict().items() if plan.dtype == torch.float16 else ()
    beyond = next((name for name, t in held if t.dtype == plan.dtype and not t.isfinite().all()), None)
    if beyond is not None:
        words = "--format hf writes the model in its own dtype" if plan.format.dtypes else "give another --dtype"
        raise WeftError(
            f"{beyond} has numbers beyond the largest of float16, {plan.format.name}'s dtype here; {words}."
        )


def _write_adapter(model: PreTrainedModel, plan: _Plan, path: Path, out: Path) -> None:
    """The low-rank terms, in the format's own way or, beside codes, as PEFT's files."""
    own = plan.format.adapter or plan.format.beside
    if own is not None and plan.beside:
        own(model, plan.beside, path)
    elif plan.beside:
        terms = {
            name: {"default" if i == 0 else f"default_{i}": term for i, term in enumerate(beside.values())}
            for name, beside in plan.beside.items()
        }
        base = replace(base_of(model, terms), name=str(out))
        LooseAdapter(Adapter("default", "lora", terms), base).save(path / ADAPTER, format="peft")


@contextmanager
def _standing_in(model: PreTrainedModel, plan: _Plan) -> Iterator[None]:
    """Within the block, what the format stores of each sum of terms in its place; afterwards the sums again."""
    found = plan.format.tensors(plan.layers, plan.dtype)
    kept = {name: model.get_submodule(name) for name in (*plan.layers, *plan.dense)}
    try:
        for name, layer in plan.layers.items():
            bias = layer.bias
            if bias is None and name in plan.room.layers:
                bias = torch.zeros(len(layer.codes.codes))
            model.set_submodule(name, Stored(found[name], None if bias is None else bias.to(plan.dtype)))
        for name in plan.dense:
            model.set_submodule(name, kept[name].collapse(plan.dtype))  # type: ignore[operator]
        with made_room(model, plan.room._replace(layers=tuple(set(plan.room.layers) - set(plan.layers)))):
            yield
    finally:
        for name, module in kept.items():
            model.set_submodule(name, module)


def _check_package(format: Format) -> None:
    if format.package is not None and importlib.util.find_spec(format.package) is None:
        raise WeftError(f"--format {format.name} needs the package {format.package}: pip install {format.package}.")


def _tokenizer(model: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(model, trust_remote_code=trust_remote_code)
    except WeftError as error:  # a vision model has none
        say(f"The model is written without a tokenizer: {error}")
        return None
