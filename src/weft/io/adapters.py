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
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.errors import WeftError, nearest
from weft.io import peft
from weft.io.adapter_files import CONFIG, FORMAT, paths, read_files, whole, write_files
from weft.io.adapter_places import check_terms, graft_in
from weft.io.base import Base, base_of, other_weights, sample
from weft.records import find
from weft.terms.adapters import Adapter, activate, adapters_of, attach, find_adapter, unwrapped
from weft.terms.experts import open_experts, within_experts
from weft.terms.extras import places, tables
from weft.terms.layers import is_linear

__all__ = [
    "FORMAT",
    "LooseAdapter",
    "load_adapter",
    "method_of",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]


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
        """The largest rank among its terms."""
        return max((getattr(term, "rank", 0) for term in self.adapter.all_terms()), default=0)

    def save(self, directory: str | os.PathLike[str], *, format: Literal["auto", "peft", "weft"] = "auto") -> None:
        """Write it, as `save_adapter` writes one that is on a model."""
        out, reason = Path(directory), _check_save(directory, self.adapter, format)
        state = {key: whole(tensor) for key, tensor in paths(self.adapter)} | self.adapter.extras
        write_files(out, self.base, self.adapter, state, format, reason)

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
    """Write an adapter (None: the only one), and with it whatever else of the model is trained (a thawed head).

    Args:
        format: "auto" for ours and, where it is exact, PEFT's beside it; "peft" or "weft" for that one alone.

    Raises:
        WeftError: no such adapter; the directory is not empty; something is trained that its files cannot hold; or
            "peft" for an adapter whose delta is not exactly a LoRA, with the reason.
    """
    write_adapter(model, directory, name, format=format, here=not (dist.is_initialized() and dist.get_rank()))
    if dist.is_initialized():
        dist.barrier()


def write_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    format: Literal["auto", "peft", "weft"] = "auto",
    here: bool = True,
) -> None:
    """What `save_adapter` does, by this process alone: it waits for no other. Of a sharded model, every process must
    call it, and one writes.

    Args:
        here: whether this process writes.
    """
    adapter = _with_thawed(unwrapped(model), find_adapter(model, name))
    reason = _check_save(directory, adapter, format, unwrapped(model))
    state, base = _gathered(model, adapter), base_of(unwrapped(model), adapter.terms)
    if here:
        write_files(Path(directory), base, adapter, state, format, reason)


@within_experts
def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str] | LooseAdapter, name: str | None = None
) -> nn.Module:
    """Put an adapter of either format, or a graft, on the model; the same model is returned.

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
    graft = None if isinstance(directory, LooseAdapter) else graft_in(directory)
    if graft is not None:
        found: nn.Module = find(graft, "graft").load(model, directory)  # type: ignore[attr-defined]
        return found
    if isinstance(directory, LooseAdapter):
        loose, place = directory, "memory"
        adapter = loose.named(name or loose.adapter.name)
    else:
        loose, place = read_adapter(directory, name, model), str(directory)
        adapter = loose.adapter
    _check_layers(model, adapter, place)
    device = {layer: _device(model, layer) for layer in adapter.terms}
    for layer, terms in adapter.terms.items():
        for term in terms.values():
            term.to(device[layer])
    _adopt(model, adapter)
    if adapter.rows:
        warnings.warn(
            f"The rows of {', '.join(adapter.rows)} that the adapter in {place} brings are used as they are; weft does "
            "not train them further.",
            stacklevel=2,
        )
    changed = other_weights(sample(model, adapter.terms), loose.base.samples) if loose.base.samples else None
    if changed is not None:
        warnings.warn(
            f"The adapter in {place} was made on other weights than this model's (they differ in {changed}); it is "
            "loaded, but what it learned may not fit.",
            stacklevel=2,
        )
    return model


def read_adapter(
    directory: str | os.PathLike[str], name: str | None = None, model: nn.Module | None = None
) -> LooseAdapter:
    """The adapter of a directory in either format, on no model.

    Args:
        name: another name than the saved one.
        model: that it is for, by whose names an adapter of PEFT is read; None for any.

    Raises:
        WeftError: the directory holds no adapter, a file is damaged, or a tensor is missing or unexpected.
    """
    path = check_terms(directory)
    if (path / CONFIG).is_file():
        return LooseAdapter(*read_files(path, name))
    return LooseAdapter(*peft.read(path, name or "default", model))


def method_of(directory: str | os.PathLike[str]) -> str:
    """The name of the method that made the adapter, or of the graft."""
    return graft_in(directory) or read_adapter(directory).adapter.method


def _check_save(
    directory: str | os.PathLike[str], adapter: Adapter, format: str, model: nn.Module | None = None
) -> str | None:
    """Why PEFT's files are not written; raises WeftError where nothing can be."""
    out, reason = Path(directory), peft.why_not_peft(adapter)
    if model is not None and reason is None:
        reason = _part_of_module(model, adapter)
    if format == "peft" and reason:
        raise WeftError(
            f"The adapter {adapter.name!r} cannot be written in PEFT's format: {reason}. Save it with format='weft'."
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise WeftError(f"The directory {out} is not empty; choose another one, or remove it first.")
    return reason


def _part_of_module(model: nn.Module, adapter: Adapter) -> str | None:
    """Why what it trains along is no list of whole modules, which is what PEFT can store."""
    for module in {key.rpartition(".")[0] for key in adapter.extras.keys() - adapter.rows.keys()}:
        for leaf, _ in model.get_submodule(module).named_parameters(recurse=False):
            if f"{module}.{leaf}" not in adapter.extras:
                return f"it trains a part of {module} and not its {leaf}"
    return None


def _with_thawed(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with every parameter that is trained beside it, so that nothing trained is left out of its files.

    Raises:
        WeftError: a part of the base's own terms is trained, which no adapter's files hold.
    """
    if not adapter.active:
        return adapter
    known = {id(p) for other in adapters_of(model).values() for _, p in other.named_parameters()}
    known |= {id(model.get_parameter(key)) for other in adapters_of(model).values() for key in other.extras}
    thawed = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in known}
    inside = next((name for name in thawed if ".terms." in name), None)
    if inside is not None:
        raise WeftError(
            f"{inside} is trained too and belongs to the base, not to the adapter {adapter.name!r}, whose files cannot "
            "hold it: freeze it, or save the whole model (model.save_pretrained)."
        )
    return replace(adapter, extras=adapter.extras | thawed)


def _adopt(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter on beside those in use, with its own values of the model's parameters that it trains."""
    for key, value in adapter.extras.items():
        adapter.extras[key] = _fitted(model, adapter, key, value)
    _drop_tied(model, adapter)
    in_use = [other.name for other in adapters_of(model).values() if other.active]
    adapter.active = False
    attach(model, adapter)
    activate(model, [*in_use, adapter.name])


@torch.no_grad()
def _fitted(model: nn.Module, adapter: Adapter, key: str, value: Tensor) -> Tensor:
    """The adapter's value of a parameter of the model, whole, in its dtype and on its device.

    Raises:
        WeftError: the model has no such parameter, or one of another shape that is no table of tokens.
    """
    parameter = _parameter(model, key)
    if parameter is not None and key in adapter.rows:
        if max(adapter.rows[key], default=0) >= len(parameter) or value.shape[1:] != parameter.shape[1:]:
            raise WeftError(
                f"The adapter trains row {max(adapter.rows[key])} of {key}, and this model's has {len(parameter)}; "
                "resize the model's table of tokens first (model.resize_token_embeddings)."
            )
        rows = torch.tensor(adapter.rows[key], device=parameter.device)
        return parameter.detach().clone().index_copy_(0, rows, value.to(parameter.device, parameter.dtype))
    is_table = any(parameter is getattr(table, "weight", None) for table in tables(model))
    if (
        parameter is None
        or (parameter.shape[1:] if is_table else parameter.shape) != value.shape[1 if is_table else 0 :]
    ):
        raise WeftError(
            f"The adapter trains {key} of shape {tuple(value.shape)}, which this model does not have; load it on "
            "its own model."
        )
    return value.to(parameter.device, parameter.dtype)


def _drop_tied(model: nn.Module, adapter: Adapter) -> None:
    """Keep one of several names of a parameter that the model ties and the adapter too. What is apart comes first, so
    that what is left of a tie is told from it.

    Raises:
        WeftError: it gives two values to one parameter.
    """
    shared = {key: len(list(places(model, model.get_parameter(key)))) > 1 for key in adapter.extras}
    adapter.apart = [key for key in adapter.apart if shared[key]]
    adapter.extras = dict(sorted(adapter.extras.items(), key=lambda item: item[0] not in adapter.apart))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for key in [key for key in adapter.extras if shared[key] and key not in adapter.apart]:
        home = first[id(model.get_parameter(key))]
        if home == key or home in adapter.apart:
            continue
        value = adapter.extras.pop(key)
        if not torch.equal(adapter.extras.setdefault(home, value), value):
            raise WeftError(
                f"The adapter has different values of {home} and {key}, which are one parameter in this model; untie "
                "them first (tie_word_embeddings=False)."
            )
        if key in adapter.rows:
            adapter.rows[home] = adapter.rows.pop(key)


def _gathered(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's whole tensors on the CPU, the same on every process.

    `<layer>.<role>.<tensor>` for its terms, `<parameter>` for what is trained along.
    """
    found = dict(paths(adapter))
    model = unwrapped(model)
    found |= {key: model.get_parameter(key) if adapter.active else aside for key, aside in adapter.extras.items()}
    return {key: whole(t)[adapter.rows[key]] if key in adapter.rows else whole(t) for key, t in found.items()}


def _check_layers(model: nn.Module, adapter: Adapter, path: str) -> None:
    open_experts(model, lambda name: name in adapter.terms)
    modules = dict(model.named_modules())
    for layer in adapter.terms:
        if not is_linear(modules.get(layer, model)):
            near = ", ".join(nearest(layer, [name for name, module in modules.items() if is_linear(module)]))
            raise WeftError(
                f"The adapter in {path} belongs to a layer {layer}, which this {type(model).__name__} lacks (nearest: "
                f"{near}); load it on the model that it was made for."
            )
        weight = modules[layer]._parameters.get("weight")
        if weight is not None and len(list(places(model, weight))) > 1:
            raise WeftError(
                f"The adapter in {path} changes {layer}, whose weight is that of another layer too (tied) and would "
                "not follow; untie them first (tie_word_embeddings=False)."
            )


def _parameter(model: nn.Module, key: str) -> nn.Parameter | None:
    """The model's parameter of that name, tied ones under each of theirs; None where there is none."""
    return dict(model.named_parameters(remove_duplicate=False)).get(key)


def _device(model: nn.Module, layer: str) -> torch.device:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight.device
