"""What is on a model, adapters or a graft: saved, loaded, switched, merged, taken off.

weft.save_adapter(model, "out/"); weft.load_adapter(model, "out/")
with weft.disable(model): ...                   # the base model
weft.set_adapter(model, ["default", "other"])   # their deltas add up
weft.remove_adapter(model)                      # the model of before, byte for byte
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch import nn

from weft.errors import WeftError
from weft.grafts import base as grafts
from weft.io import adapters as files
from weft.io.plain import make_room, room_for_biases
from weft.io.quantizer import remark
from weft.terms import adapters

__all__ = [
    "check_ungrafted",
    "disable",
    "load_adapter",
    "merge_adapter",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
]


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    format: Literal["auto", "peft", "weft"] = "auto",
) -> None:
    """Write an adapter (None: the only one) or the graft.

    Args:
        format: "auto" for ours and, where it is exact, PEFT's beside it; "peft" or "weft" for that one alone.

    Raises:
        WeftError: no such adapter; the directory is not empty; or "peft" for what is not exactly a LoRA.

    Example:
        >>> weft.save_adapter(weft.adapt(model, "pissa", rank=4), "adapter/")
    """
    graft = grafts.graft_of(model)
    if graft is None or name is not None:
        return files.save_adapter(model, directory, name, format=format)
    if format == "peft":
        raise WeftError(f"{graft.name!r} changes the forward pass, which PEFT's format has no words for.")
    grafts.save(model, directory)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str] | files.LooseAdapter, name: str | None = None
) -> nn.Module:
    """Put a saved adapter, of weft's or PEFT's format, or a saved graft on the model; the same model is returned.

    On other weights than those that it was made on it loads with a warning: people do so on purpose, with another
    fine-tuning of the same base or after a merge.

    Args:
        directory: of an adapter or a graft, or what `weft.combine` returned.
        name: another name than the saved one, for an adapter.

    Raises:
        WeftError: the directory holds neither, a file is damaged, a tensor is missing or unexpected, it belongs to
            another model, or its name is taken.

    Example:
        >>> weft.save_adapter(weft.adapt(model, "lora", rank=4), "adapter/")
        >>> model = weft.load_adapter(model, "adapter/", name="again")
    """
    if not isinstance(directory, files.LooseAdapter) and (Path(directory) / grafts.CONFIG).is_file():
        return grafts.load(model, directory)
    check_ungrafted(model)
    return files.load_adapter(model, directory, name)


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """The base model alone, within the block: every adapter, or the graft, is put aside and put back.

    Example:
        >>> with weft.disable(weft.adapt(model, "lora")):
        ...     logits = model(**batches[0]).logits
    """
    with grafts.aside(model) if grafts.graft_of(model) else adapters.disable(model):
        yield


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Use exactly these adapters; their deltas add up.

    An empty list is the base model. Raises WeftError for an unknown name.

    Example:
        >>> model = weft.adapt(weft.adapt(model, "lora", name="one"), "lora", name="two")
        >>> weft.set_adapter(model, ["one", "two"])
    """
    check_ungrafted(model)
    adapters.activate(model, [names] if isinstance(names, str) else names)


def remove_adapter(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take an adapter off (None: the only one), or the graft. Without any other the model is what it was before, byte
    for byte.

    Raises:
        WeftError: there is no such adapter, or several and no name.

    Example:
        >>> model = weft.remove_adapter(weft.adapt(model, "lora", rank=4))
    """
    if grafts.graft_of(model) is not None and name is None:
        return grafts.remove(model)
    adapters.detach(model, name)
    remark(model)
    return model


def merge_adapter(model: nn.Module, name: str | None = None) -> dict[str, float]:
    """Fold an adapter (None: the only one) into the base for good, in fp32, cast last.

    Returns:
        layer -> how much of the update the cast to the layer's dtype loses, relative to its norm: about 1 where it is
        below the dtype's resolution, and then keep the adapter apart or merge in fp32 (model.float() first).

    Raises:
        WeftError: there is no such adapter, several and no name, or a graft, which is no sum with a weight; a layer is
            no matrix, or has got a bias that a plain model has no place for.

    Example:
        >>> lost = weft.merge_adapter(weft.adapt(model, "lora", rank=4))
    """
    check_ungrafted(model)
    own = adapters.unwrapped(model)
    room = room_for_biases(own, adapters.find_adapter(own, name).terms)
    lost = adapters.merge(model, name)
    make_room(own, room)
    remark(model)
    return lost


def check_ungrafted(model: nn.Module) -> None:
    """Raises WeftError where a graft is on the model, which stands alone."""
    graft = grafts.graft_of(model)
    if graft is not None:
        raise WeftError(
            f"There is the graft {graft.name!r} on this model, which stands alone and cannot be merged into weights; "
            "weft.disable(model) puts it aside, weft.remove_adapter(model) takes it off."
        )
