"""How many bytes of tensors are alive while something runs, and at most: counted storage by storage, on any device, and
for tensors without storage as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Live", "tensors_in"]

_DEVICE = torch.ops.prim.device.default


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Those among what a call was given, or gave."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for one in x:
            yield from tensors_in(one)
    elif isinstance(x, dict):
        yield from tensors_in([*x.values()])


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, `now` and `peak` are the bytes of what was made in it, or was counted, and is still there.

    A storage counts once, whatever views there are of it; memory that kernels use for themselves is not seen.

    Args:
        device: count what is on devices of this type alone.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which costs as much as a call

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; their bytes."""
        before = self.now
        for tensor in tensors:
            self._see(tensor)
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of what is asked of tensors without values
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_in(made):
            self._see(tensor)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or (self.device is not None and tensor.device.type != self.device):
            return
        size = storage.nbytes()
        self.known[key] = weakref.ref(storage, partial(self._lose, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _lose(self, key: int, size: int, storage: object) -> None:
        del self.known[key]
        self.now -= size
