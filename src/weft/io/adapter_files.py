"""The files of an adapter, written and read as `weft.io.adapters` says: our own format, and PEFT's beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.io import peft
from weft.io.base import Base
from weft.tensors import read_tensors
from weft.terms import Term, build
from weft.terms.adapters import Adapter
from weft.terms.random_products import share_stores

__all__ = ["CONFIG", "FORMAT", "GRAFT_CONFIG", "paths", "read_files", "whole", "write_files"]

FORMAT = 2
"""The version of the layout; raised when an older weft could not read what this one writes."""
CONFIG, TENSORS = "weft_adapter.json", "weft_adapter.safetensors"
GRAFT_CONFIG = "weft_graft.json"
"""In the place of CONFIG where what is trained beside the model is a graft (`weft.grafts.base`)."""


def write_files(
    out: Path, base: Base, adapter: Adapter, state: dict[str, Tensor], format: str, reason: str | None
) -> None:
    """Write all files beside `out`, then rename.

    Args:
        state: the whole tensors of the terms as `paths` names them, and of the extras by their own names.
        reason: why PEFT's files cannot be; None where they can.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        itself = False
        if format != "weft" and not reason:
            copies = {layer: _copies(adapter, layer, state) for layer in adapter.terms}
            itself = peft.write(partial, base, adapter, copies, {key: state[key] for key in adapter.extras})
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
        copy, prefix = build(term.own_spec(), device="meta"), f"{layer}.{_role(adapter, key)}."
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
        "apart": adapter.apart,
        "rows": adapter.rows,
        "tied": tied,
        "layers": {
            layer: {
                _role(adapter, key): {
                    "spec": term.own_spec(),
                    "trained": [name for name, tensor in term.own_state().items() if id(tensor) in trained],
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
    homes = {path: first.setdefault(id(tensor), path) for path, tensor in paths(adapter)}
    return {path: home for path, home in homes.items() if path != home}


def read_files(path: Path, name: str | None) -> tuple[Adapter, Base]:
    """The adapter of our own format. Raises WeftError where a file is damaged, or a tensor missing or unexpected."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        _check_format(path, config)
        own = path / TENSORS
        adapter = Adapter(name or config["name"], config["method"], {}, config["settings"], config["rates"])
        adapter.apart, adapter.rows = config.get("apart", []), config.get("rows", {})  # absent in format 1
        state = (
            read_tensors(own) if own.is_file() else peft.plain_state(path, config["layers"], adapter, config["extras"])
        )
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
    return adapter, base


def _check_format(path: Path, config: Mapping[str, Any]) -> None:
    if not 1 <= config["format"] <= FORMAT:
        raise WeftError(
            f"it has format {config['format']} (written by weft {config['weft']}), and this weft reads formats up to "
            f"{FORMAT}"
        )


def _term(prefix: str, entry: Mapping[str, Any], state: dict[str, Tensor]) -> Term:
    """Build one term and take its tensors out of `state`."""
    term = build(entry["spec"], device="meta")
    names = list(term.own_state())
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
        for name in term.own_state()
    }
    for path, home in tied.items():
        (term, name), (source, source_name) = homes[path], homes[home]
        owner, _, leaf = name.rpartition(".")
        setattr(term.get_submodule(owner), leaf, source.own_state()[source_name])


def paths(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of its terms, as `<layer>.<role>.<tensor>`."""
    for layer, terms in adapter.terms.items():
        for key, term in terms.items():
            for name, tensor in term.own_state().items():
                yield f"{layer}.{_role(adapter, key)}.{name}", tensor


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
