"""What a plain model of transformers has a place for: matrices, and biases where its configuration says that its layers
have them.

A compression may give biases to layers that had none (afm, LoRD). A plain model then says so in its configuration, and
the layers that are spoken of together get biases of zeros; without such a word transformers would drop them when it
opens the files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.errors import WeftError
from weft.terms.experts import biased_experts
from weft.terms.sum_linear import SumLinear

__all__ = ["Room", "check_matrices", "made_room", "make_room", "room_for_biases"]


class Room(NamedTuple):
    """What makes a place for every bias: words of the configuration, and the layers that get zeros."""

    switches: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    def configured(self, config: Any) -> Any:
        """A copy of the configuration that says these words."""
        made = copy.deepcopy(config)
        for switch in self.switches:
            setattr(made, switch, True)
        return made


def check_matrices(model: nn.Module, layers: Iterable[str]) -> None:
    """Raises WeftError, with its name and the reason, for the first of these sums of terms that is no matrix."""
    for name in layers:
        for term in model.get_submodule(name)._terms():  # type: ignore[operator]
            if not term.linear:
                try:
                    term.dense()
                except WeftError as error:
                    words = str(error)
                    raise WeftError(f"{name}: {words[0].lower()}{words[1:]}") from error


def room_for_biases(model: nn.Module, layers: Iterable[str] | None = None) -> Room:
    """What a plain model like this one lacks for the biases of these sums of terms (None: of all).

    Raises:
        WeftError: one of them has no place, whatever the configuration says.
    """
    sums = {name for name, module in model.named_modules() if isinstance(module, SumLinear) and _biased(module)}
    gained = (sums if layers is None else sums & set(layers)) - biased_experts(model)
    if not gained or not isinstance(model, PreTrainedModel):
        return Room()
    before = _places(model, Room())
    strange = gained - before
    off = [name for name, value in model.config.to_dict().items() if name.endswith("bias") and value is False]
    switches = tuple(name for name in off if strange and strange & _places(model, Room((name,))))
    after = _places(model, Room(switches)) if switches else before
    if strange - after:
        raise WeftError(
            f"{min(strange - after)} has got a bias, for which a plain {type(model).__name__} has no place; compress "
            "without biases (--option bias=False), or keep the weft directory, which transformers opens after `import "
            "weft`."
        )
    return Room(switches, tuple(name for name in sorted(after - before) if not _biased(model.get_submodule(name))))


def make_room(model: nn.Module, room: Room) -> None:
    """Set the words of the configuration, and give the layers their zeros."""
    for switch in room.switches:
        setattr(model.config, switch, True)  # type: ignore[arg-type]
    for name in room.layers:
        layer: Any = model.get_submodule(name)
        tensors = list(layer.state_dict().values())
        zeros = torch.zeros(layer.out_features, dtype=layer.weight.dtype, device=tensors[0].device)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)


@contextmanager
def made_room(model: nn.Module, room: Room) -> Iterator[None]:
    """The same within the block alone."""
    layers: list[Any] = [model.get_submodule(name) for name in room.layers]
    make_room(model, room)
    try:
        yield
    finally:
        for switch in room.switches:
            setattr(model.config, switch, False)  # type: ignore[arg-type]
        for layer in layers:
            layer.bias = None


def _biased(layer: Any) -> bool:
    return getattr(layer, "bias", None) is not None


def _places(model: PreTrainedModel, room: Room) -> set[str]:
    """The layers that have a bias in a plain model like this one whose configuration says these words."""
    with torch.device("meta"):
        plain = type(model)(room.configured(model.config))
    return {name for name, module in plain.named_modules() if _biased(module)}
