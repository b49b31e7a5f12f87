"""What a training step keeps between its forward and its backward pass, in bytes, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["saved_bytes"]


class _Held:
    """Lives as long as autograd keeps the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph a saved output would hold itself, for ever


def saved_bytes(forward: Callable[[], Any], own: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that autograd holds after `forward()`, each storage counted once.

    Args:
        forward: runs the forward pass and returns what backward would start from.
        own: tensors that are there anyway (parameters, buffers) and do not count.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        holder = _Held(tensor)
        held.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        output = forward()
    storages = [holder.tensor.untyped_storage() for holder in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output  # what it holds was to be counted
    there = {t.untyped_storage().data_ptr() for t in own}
    return sum(size for pointer, size in sizes.items() if pointer not in there)
