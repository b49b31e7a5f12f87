"""How many bytes of tensors are alive while something runs, and at most: counted storage by storage, on any device, and
for tensors without storage as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Live"]

_DEVICE = torch.ops.prim.device.default


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
        self.known: set[int] = set()

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
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or (self.device is not None and tensor.device.type != self.device):
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._lose, key, size)

    def _lose(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
