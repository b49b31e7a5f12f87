"""Adapters on disk: our own format, which rebuilds an adapter bit for bit, and PEFT's, wherever the delta is exactly
a LoRA.

    DIR/weft_adapter.json            method, settings, the spec of every term, the base's fingerprint (`weft.io.base`)
    DIR/weft_adapter.safetensors     the terms' tensors as they are, "<layer>.<role>.<tensor>"
    DIR/adapter_config.json          PEFT's, for every reader of LoRAs (see `weft.io.peft`)
    DIR/adapter_model.safetensors    the factors of that LoRA

`weft_adapter.safetensors` is absent where PEFT's tensors are the same. An adapter without PEFT files has no exact LoRA;
`why_not_peft` says why. Everything is written beside the directory and renamed when complete. Under FSDP2 the shards
are gathered on every process and written by the first: call it on all of them.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.errors import WeftError, nearest
from weft.io import peft
from weft.io.base import Base, base_of, other_weights, sample
from weft.tensors import read_tensors
from weft.terms import LowRank, Term, build
from weft.terms.adapters import Adapter, activate, adapters_of, attach, find_adapter, unwrapped
from weft.terms.layers import linear_layers
from weft.terms.random_products import share_stores

__all__ = ["FORMAT", "LooseAdapter", "check_directory", "load_adapter", "read_adapter", "save_adapter"]

FORMAT = 1
"""The version of the layout; raised when an older weft could not read what this one writes."""
CONFIG, TENSORS = "weft_adapter.json", "weft_adapter.safetensors"


@dataclass(frozen=True)
class LooseAdapter:
    """An adapter on no model: read from a directory, or combined from several.

    Args:
        adapter: its terms and settings.
        base: what is known of the model that it was made on.
    """

    adapter: Adapter
    base: Base

    @property
    def rank(self) -> int:
        """The largest rank among its low-rank terms."""
        return max((term.rank for term in self.adapter.all_terms() if isinstance(term, LowRank)), default=0)

    def save(self, directory: str | os.PathLike[str], *, format: Literal["auto", "peft", "weft"] = "auto") -> None:
        """Write it, as `save_adapter` writes one that is on a model."""
        out, reason = Path(directory), _check_save(directory, self.adapter, format)
        state = {key: whole(tensor) for key, tensor in _paths(self.adapter)} | self.adapter.extras
        _write(out, self.base, self.adapter, state, format, reason)

    def named(self, name: str) -> Adapter:
        """A copy of the adapter under this name."""
        made = copy.deepcopy(self.adapter)
        made.terms = {
            layer: {f"{name}{key.removeprefix(made.name)}": term for key, term in terms.items()}
            for layer, terms in made.terms.items()
        }
        made.name = name
        return made


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    format: Literal["auto", "peft", "weft"] = "auto",
) -> None:
    """Write an adapter (None: the only one).

    Args:
        format: "auto" for ours and, where it is exact, PEFT's beside it; "peft" or "weft" for that one alone.

    Raises:
        WeftError: no such adapter; the directory is not empty; or "peft" for an adapter whose delta is not exactly a
        LoRA, with the reason.
    """
    adapter = find_adapter(model, name)
    reason = _check_save(directory, adapter, format)
    state, base = _gathered(model, adapter), base_of(unwrapped(model), adapter.terms)
    if not (dist.is_initialized() and dist.get_rank()):
        _write(Path(directory), base, adapter, state, format, reason)
    if dist.is_initialized():
        dist.barrier()


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str] | LooseAdapter, name: str | None = None
) -> nn.Module:
    """Put an adapter of either format on the model; the same model is returned.

    On other weights than those that the adapter was made on it loads with a warning: people do so on purpose, with
    another fine-tuning of the same base or after a merge.

    Args:
        directory: of an adapter, or what `weft.combine` returned.
        name: another name than the saved one.

    Raises:
        WeftError: the directory holds no adapter, a file is damaged, a tensor is missing or unexpected, the adapter
            belongs to another model, or its name is taken.
    """
    model = unwrapped(model)
    if isinstance(directory, LooseAdapter):
        loose, place = directory, "memory"
        adapter = loose.named(name or loose.adapter.name)
    else:
        loose, place = read_adapter(directory, name, {key for key, _ in model.named_parameters()}), str(directory)
        adapter = loose.adapter
    _check_layers(model, adapter, place)
    device = {layer: _device(model, layer) for layer in adapter.terms}
    for layer, terms in adapter.terms.items():
        for term in terms.values():
            term.to(device[layer])
    _adopt(model, adapter)
    changed = other_weights(sample(model, adapter.terms), loose.base.samples) if loose.base.samples else None
    if changed is not None:
        warnings.warn(
            f"The adapter in {place} was made on other weights than this model's (they differ in {changed}); it is "
            "loaded, but what it learned may not fit.",
            stacklevel=2,
        )
    return model


def read_adapter(
    directory: str | os.PathLike[str], name: str | None = None, parameters: Container[str] | None = None
) -> LooseAdapter:
    """The adapter of a directory in either format, on no model.

    Args:
        name: another name than the saved one.
        parameters: names of the model's parameters, of which alone an adapter of PEFT may bring values; None for any.

    Raises:
        WeftError: the directory holds no adapter, a file is damaged, or a tensor is missing or unexpected.
    """
    path = check_directory(directory)
    if (path / CONFIG).is_file():
        return _read(path, name)
    return LooseAdapter(*peft.read(path, name or "default", parameters))


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """The directory as a path. Raises WeftError where there is no adapter in it."""
    path = Path(directory)
    if not (path / CONFIG).is_file() and not (path / peft.CONFIG).is_file():
        raise WeftError(f"{path} holds no adapter: neither {CONFIG} nor {peft.CONFIG} is there.")
    return path


def _check_save(directory: str | os.PathLike[str], adapter: Adapter, format: str) -> str | None:
    """Why PEFT's files are not written; raises WeftError where nothing can be."""
    out, reason = Path(directory), peft.why_not_peft(adapter)
    if format == "peft" and reason:
        raise WeftError(
            f"The adapter {adapter.name!r} cannot be written in PEFT's format: {reason}. Save it with format='weft'."
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise WeftError(f"The directory {out} is not empty; choose another one, or remove it first.")
    return reason


def _adopt(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter on beside those in use, with its own values of the model's parameters that it trains."""
    for key, value in adapter.extras.items():
        parameter = dict(model.named_parameters()).get(key)
        if parameter is None or parameter.shape != value.shape:
            raise WeftError(
                f"The adapter trains {key} of shape {tuple(value.shape)}, which this model does not have; load it on "
                "its own model."
            )
        adapter.extras[key] = value.to(parameter.device, parameter.dtype)
    in_use = [other.name for other in adapters_of(model).values() if other.active]
    adapter.active = False
    attach(model, adapter)
    activate(model, [*in_use, adapter.name])


def _gathered(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's whole tensors on the CPU, the same on every process.

    `<layer>.<role>.<tensor>` for its terms, `<parameter>` for what is trained along.
    """
    found = dict(_paths(adapter))
    parameters = dict(unwrapped(model).named_parameters())
    found |= {key: parameters[key] if adapter.active else aside for key, aside in adapter.extras.items()}
    return {key: whole(tensor) for key, tensor in found.items()}


def _paths(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of its terms, as `<layer>.<role>.<tensor>`."""
    for layer, terms in adapter.terms.items():
        for key, term in terms.items():
            for name, tensor in own_state(term).items():
                yield f"{layer}.{_role(adapter, key)}.{name}", tensor


def own_state(term: Term) -> dict[str, Tensor]:
    """The term's tensors, without those of a base that it wraps."""
    state = term.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not name.startswith("inner.")}


def own_spec(term: Term) -> dict[str, Any]:
    """The term's spec without a base that it wraps."""
    spec = term.spec()
    return {**spec, "inner": {}} if "inner" in spec else spec


def whole(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor, on the CPU."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _role(adapter: Adapter, key: str) -> str:
    """The term's name without the adapter's: "main" for the first."""
    return key.removeprefix(adapter.name).removeprefix("_") or "main"


def _key(adapter: Adapter, role: str) -> str:
    """The inverse of `_role`."""
    return adapter.name if role == "main" else f"{adapter.name}_{role}"


def _write(out: Path, base: Base, adapter: Adapter, state: dict[str, Tensor], format: str, reason: str | None) -> None:
    """Write all files beside `out`, then rename."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        itself = False
        if format != "weft" and not reason:
            copies = {layer: _copies(adapter, layer, state) for layer in adapter.terms}
            itself = peft.write(partial, base, copies)
        if format != "peft":
            _write_own(partial, base, adapter, state, with_tensors=not itself)
        if out.is_dir():
            out.rmdir()  # empty, as was checked
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copies(adapter: Adapter, layer: str, state: Mapping[str, Tensor]) -> list[Term]:
    """A layer's terms again, holding the whole tensors."""
    copies = []
    for key, term in adapter.terms[layer].items():
        copy, prefix = build(own_spec(term), device="meta"), f"{layer}.{_role(adapter, key)}."
        copy.load_state_dict({k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}, assign=True)
        copies.append(copy)
    return copies


def _write_own(partial: Path, base: Base, adapter: Adapter, state: dict[str, Tensor], *, with_tensors: bool) -> None:
    trained, tied = {id(p) for _, p in adapter.named_parameters()}, _tied(adapter)
    config = {
        "format": FORMAT,
        "weft": version("weft"),
        "base": base.json(),
        "name": adapter.name,
        "method": adapter.method,
        "settings": adapter.settings,
        "rates": adapter.rates,
        "extras": list(adapter.extras),
        "tied": tied,
        "layers": {
            layer: {
                _role(adapter, key): {
                    "spec": own_spec(term),
                    "trained": [name for name, tensor in own_state(term).items() if id(tensor) in trained],
                }
                for key, term in terms.items()
            }
            for layer, terms in adapter.terms.items()
        },
    }
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if with_tensors:
        unique = {key: tensor.contiguous() for key, tensor in state.items() if key not in tied}
        save_file(unique, partial / TENSORS)


def _tied(adapter: Adapter) -> dict[str, str]:
    """Tensors that several terms share: path -> the path it is saved under."""
    first: dict[int, str] = {}
    homes = {path: first.setdefault(id(tensor), path) for path, tensor in _paths(adapter)}
    return {path: home for path, home in homes.items() if path != home}


def _read(path: Path, name: str | None) -> LooseAdapter:
    """The adapter of our own format."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        _check_format(path, config)
        own = path / TENSORS
        state = read_tensors(own) if own.is_file() else peft.plain_state(path, config["layers"])
        adapter = Adapter(name or config["name"], config["method"], {}, config["settings"], config["rates"])
        base = Base.from_json(config["base"])
        state |= {tied: state[home] for tied, home in config["tied"].items()}
        adapter.extras = {key: state.pop(key) for key in config["extras"]}
        for layer, roles in config["layers"].items():
            terms = {_key(adapter, role): _term(f"{layer}.{role}", entry, state) for role, entry in roles.items()}
            adapter.terms[layer] = terms
        if state:
            raise WeftError(f"it holds the tensor {min(state)}, of which its {CONFIG} knows nothing")
        _tie(adapter, config["tied"])
        share_stores(adapter.all_terms())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join((str(error) if isinstance(error, WeftError) else repr(error)).split())
        raise WeftError(f"The adapter in {path} cannot be read: {reason}; fetch it again, whole.") from error
    return LooseAdapter(adapter, base)


def _check_format(path: Path, config: Mapping[str, Any]) -> None:
    if config["format"] != FORMAT:
        raise WeftError(
            f"it has format {config['format']} (written by weft {config['weft']}), and this weft reads format {FORMAT}"
        )


def _term(prefix: str, entry: Mapping[str, Any], state: dict[str, Tensor]) -> Term:
    """Build one term and take its tensors out of `state`."""
    term = build(entry["spec"], device="meta")
    names = list(own_state(term))
    missing = [name for name in names if f"{prefix}.{name}" not in state]
    if missing:
        raise WeftError(f"the tensor {prefix}.{missing[0]} is missing")
    term.load_state_dict({name: state.pop(f"{prefix}.{name}") for name in names}, assign=True)
    for name, parameter in term.named_parameters():
        parameter.requires_grad_(name in entry["trained"])
    return term


def _tie(adapter: Adapter, tied: Mapping[str, str]) -> None:
    """Make terms share again what they shared when they were saved."""
    homes = {
        f"{layer}.{_role(adapter, key)}.{name}": (term, name)
        for layer, terms in adapter.terms.items()
        for key, term in terms.items()
        for name in own_state(term)
    }
    for path, home in tied.items():
        (term, name), (source, source_name) = homes[path], homes[home]
        owner, _, leaf = name.rpartition(".")
        setattr(term.get_submodule(owner), leaf, own_state(source)[source_name])


def _check_layers(model: nn.Module, adapter: Adapter, path: str) -> None:
    layers = linear_layers(model)
    strange = next((layer for layer in adapter.terms if layer not in layers), None)
    if strange is not None:
        near = ", ".join(nearest(strange, layers))
        raise WeftError(
            f"The adapter in {path} belongs to a layer {strange}, which this {type(model).__name__} lacks (nearest: "
            f"{near}); "
            "load it on the model that it was made for."
        )


def _device(model: nn.Module, layer: str) -> torch.device:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.device
