"""A checkpoint's precision, kept: a model that was widened to compute in is written as it was read.

    load in fp32 on a CPU   ->   note_precision(model, directory)   ->   as_stored(model): save_pretrained

Every tensor returns to the dtype that its file had it in, exactly, since what came from bf16 is a number of bf16 still;
the terms that took a weight's place get the weight's. Adapters keep their own precision, and codes are integers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from weft.io.headers import FLOATS, read_headers, renamed
from weft.terms.adapters import adapters_of
from weft.terms.layers import eligible, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["as_stored", "bits_per_weight", "layer_bytes", "note_as", "note_precision", "saved_dtype", "saved_size"]


class Stored(NamedTuple):
    """The dtypes of a checkpoint."""

    by_name: Mapping[str, torch.dtype]  # by the model's names
    usual: torch.dtype  # of most numbers


_STORED: weakref.WeakKeyDictionary[nn.Module, Stored] = weakref.WeakKeyDictionary()


def note_precision(model: PreTrainedModel, directory: Path) -> None:
    """Remember in which dtypes the safetensors files of `directory` hold the tensors of this model."""
    headers = renamed(model, read_headers([str(file) for file in sorted(directory.glob("*.safetensors"))]), None)
    dtypes = {name: FLOATS[header.dtype] for name, header in headers.items() if header.dtype in FLOATS}
    if dtypes:
        numbers: dict[torch.dtype, int] = {}
        for name, dtype in dtypes.items():
            numbers[dtype] = numbers.get(dtype, 0) + torch.Size(headers[name].shape).numel()
        _STORED[model] = Stored(dtypes, max(numbers, key=lambda dtype: numbers[dtype]))


def note_as(model: nn.Module, other: nn.Module) -> None:
    """Remember for a model that was made of another's tensors what is known of that one's checkpoint."""
    if other in _STORED:
        _STORED[model] = _STORED[other]


def saved_dtype(model: nn.Module, name: str, tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor of the model is written in: its own, or a narrower one that its checkpoint had."""
    stored = _STORED.get(model)
    layer, inside, term = name.partition(".terms.")
    if stored is None or not tensor.is_floating_point() or (inside and term.split(".")[0] in adapters_of(model)):
        return tensor.dtype
    home = stored.by_name.get(f"{layer}.weight", stored.usual) if inside else stored.usual
    dtype = stored.by_name.get(name, home)
    return dtype if dtype.itemsize < tensor.dtype.itemsize else tensor.dtype


def saved_size(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes) that saving the model stores: every parameter and persistent buffer once, tied ones
    included once.
    """
    stored = {
        (t.data_ptr(), t.shape, t.stride()): t.numel() * saved_dtype(model, name, t).itemsize
        for name, t in model.state_dict().items()
        if t.numel()
    }
    parameters = {p.data_ptr(): p.numel() for p in model.parameters()}
    return sum(parameters.values()), sum(stored.values())


def layer_bytes(model: nn.Module, layers: Iterable[str]) -> int:
    """Bytes that saving the model stores for the weights of these layers, without the biases."""
    homes = {home for layer in layers for home in (f"{layer}.weight", f"{layer}.terms")}
    return sum(
        t.numel() * saved_dtype(model, name, t).itemsize
        for name, t in model.state_dict().items()
        if name in homes or name.partition(".terms.")[0] + ".terms" in homes
    )


def bits_per_weight(model: nn.Module) -> float | None:
    """Mean bits a weight of the linear layers that weft compresses (`weft.terms.layers`), of everything that saving
    stores for them, codes, scales, zero points and factors; None where the model has none.
    """
    layers = eligible(model)
    shapes = [shape_of(layer) for layer in layers.values()]
    return 8 * layer_bytes(model, layers) / sum(out * inn for out, inn in shapes) if shapes else None


def _is_number(tensor: Tensor) -> bool:
    """Whether it is no code: floating-point numbers of one byte are codes, with a scale beside them."""
    return tensor.is_floating_point() and tensor.itemsize > 1


@contextmanager
def as_stored(model: nn.Module, dtype: torch.dtype | None = None, *, widened: bool = False) -> Iterator[None]:
    """Within the block, every tensor in the dtype that it is to be written in; afterwards as before.

    Args:
        dtype: for all floating-point tensors; None for that of the checkpoint, where the model was widened.
        widened: the numbers that will be written, in the dtypes that the tensors have: for measuring them.
    """
    held = [*model.named_parameters(), *model.named_buffers()] if dtype or model in _STORED else []
    wanted = {
        id(t): saved_dtype(model, name, t) if dtype is None else dtype if _is_number(t) else t.dtype for name, t in held
    }
    changed = [(t, t.data) for _, t in held if wanted[id(t)] != t.dtype]
    kept = getattr(getattr(model, "config", None), "dtype", None)
    try:
        for tensor, data in changed:
            stored = data.to(wanted[id(tensor)])
            stored = stored.to(data.dtype) if widened else stored
            if not widened or not torch.equal(stored, data):  # what was not trained takes no second copy
                tensor.data = stored
        yield
    finally:
        for tensor, data in changed:
            tensor.data = data
        if changed and hasattr(model, "config"):
            model.config.dtype = kept  # type: ignore[union-attr, assignment]
