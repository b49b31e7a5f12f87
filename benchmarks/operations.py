"""Counting what work dispatches: operations, whose launches may bound it on a GPU, the bytes that they touch, and what
makes a processor wait for the GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Operations"]


FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "promote_types", "_local_scalar_dense"}
"""What starts nothing on a device."""


WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_linalg_check_errors"}
"""What a processor waits for, a mask as an index besides."""


class Operations(TorchDispatchMode):
    """Counts operations of aten that are no views, the bytes of the tensors that they read and write, and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        masked = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITS or masked:
            self.waits[name] += 1
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            changed = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info is not None]
            written = [t for t in tree_leaves((result, changed)) if isinstance(t, Tensor)]
            self.counts[name] += 1
            self.bytes[name] += sum(
                t.numel() * t.element_size() for t in (*read, *{id(t): t for t in written}.values())
            )
        return result

    @property
    def total(self) -> int:
        return self.counts.total()
