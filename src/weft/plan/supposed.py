"""Going on where a computation asks for values, on tensors that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from weft.memory.live import tensors_in
from weft.plan.recall import recalled

__all__ = ["Supposed", "unmasked"]

_aten = torch.ops.aten


class Supposed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, a number read from a tensor without values is 1, any two such tensors of a shape are equal, a
    mask chooses all entries, all of them are so and none is, and no number is zero, which is what checks of values hope
    for: what depends on shapes alone is as it would be. Tensors with values keep them. `masked` says whether
    a mask has chosen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.masked = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        special = func in _ANSWERS or func in _INDEXING
        if special and any(_valueless(tensor) for tensor in tensors_in(args)):
            if func in _ANSWERS:
                return _ANSWERS[func](*args)
            self.masked = self.masked or any(index is not None and index.dtype == torch.bool for index in args[1])
            args = (args[0], [*_unmasked(args[1])], *args[2:])
        found = recalled(func, args, kwargs or {})
        if func in _NONE_IS and _valueless(found) and args[0].dtype == torch.bool:
            found.supposed = False  # type: ignore[attr-defined]
        return found


def unmasked() -> AbstractContextManager[Any]:
    """Within the block, rows are of one document each: transformers, which makes a mask of (batch, 1, window, window)
    wherever it cannot see the positions, makes none.
    """
    return mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False)


def _valueless(x: Any) -> bool:
    return isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta)


def _number(x: Tensor) -> bool | int | float:
    if x.dtype == torch.bool:
        return getattr(x, "supposed", True)
    return 1.0 if x.is_floating_point() else 1


def _places(x: Tensor) -> Tensor:
    return x.new_empty((x.numel(), x.dim()), dtype=torch.long)


def _unmasked(indices: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    """Indices without masks: as many places as each has entries."""
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            yield from (index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim()))
        else:
            yield index


_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _number,
    _aten.equal.default: lambda x, y: x.shape == y.shape,
    _aten.nonzero.default: _places,
}
_NONE_IS = (_aten.any.default, _aten.any.dim, _aten.any.dims)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
