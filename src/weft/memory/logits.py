"""Logits that are a promise: the hidden states and the head, not their product.

A model's own code keeps running on them: element-wise steps (softcapping, scales, the cast to fp32), slices of tokens
and reshapes are written down, and `F.cross_entropy` takes the chunked way with exactly those steps. Anything else
makes the logits after all, and goes on with the tensor, so that no use of them can be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from weft.memory.cross_entropy import (
    CHUNK_LOGITS,
    chunked_cross_entropy,
    cut_cross_entropy,
    in_chunks,
    linear_cross_entropy,
)
from weft.memory.lesson import Lesson

__all__ = ["Logits", "Taught"]

_LOSS_OPTIONS = {"ignore_index", "reduction", "label_smoothing"}


@dataclass(frozen=True)
class Taught:
    """What is learned of a teacher's logits of the same tokens.

    Args:
        lessons: gets the tokens of each loss that was one of learning.
    """

    lesson: Lesson
    logits: Logits
    lessons: list[int] = field(default_factory=list)


class Logits:
    """steps(head(hidden)) of shape (..., width), made when it must be.

    Args:
        hidden: (..., in).
        head: (..., in) -> (..., width).
        parameters: the head's trained tensors.
        width: the size of the vocabulary.
        weight: the head's whole matrix (width, in) where it is one without a bias, for a fused kernel.
        steps: element-wise functions, in order.
        taught: what is learned of a teacher's logits of the same tokens, in the place of the labels.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        width: int,
        weight: Tensor | None = None,
        steps: tuple[Callable[[Tensor], Tensor], ...] = (),
        taught: Taught | None = None,
    ) -> None:
        self._hidden, self._head, self._parameters = hidden, head, parameters
        self._width, self._weight, self._steps = width, weight, steps
        self._taught = taught
        self._made: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._width))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def tensor(self) -> Tensor:
        """The logits themselves, kept from then on."""
        if self._made is None:
            self._made = self._logits(self._hidden)
        return self._made

    def contiguous(self) -> Logits:
        return self

    def float(self) -> Logits:
        return self._then(Tensor.float)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return self._then(partial(_cast, args[0]))
        return self.tensor().to(*args, **kwargs)

    def __truediv__(self, other: Any) -> Any:
        return self._scaled(torch.div, other)

    def __mul__(self, other: Any) -> Any:
        return self._scaled(torch.mul, other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        whole_last = Ellipsis not in parts and len(parts) < len(self.shape)
        if whole_last or (len(parts) == len(self.shape) and parts[-1] == slice(None) and Ellipsis not in parts[1:]):
            return self._of(lambda hidden: hidden[index])
        return self.tensor()[index]

    def view(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes and sizes[-1] == self._width:
            return self._of(lambda hidden: hidden.reshape(*sizes[:-1], hidden.shape[-1]))
        return self.tensor().reshape(*sizes)

    reshape = view

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.tanh and isinstance(args[0], Logits):
            return args[0]._then(torch.tanh)
        if function is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        args, kwargs = tree_map(_made, (args, kwargs))
        return function(*args, **kwargs)

    def _logits(self, hidden: Tensor) -> Tensor:
        z = self._head(hidden)
        for step in self._steps:
            z = step(z)
        return z

    def _of(self, tokens: Callable[[Tensor], Tensor]) -> Logits:
        """Those of other tokens, or in another shape; a teacher's go along."""
        taught = None if self._taught is None else replace(self._taught, logits=self._taught.logits._of(tokens))
        return Logits(
            tokens(self._hidden), self._head, self._parameters, self._width, self._weight, self._steps, taught
        )

    def _then(self, step: Callable[[Tensor], Tensor]) -> Logits:
        steps = (*self._steps, step)
        return Logits(self._hidden, self._head, self._parameters, self._width, self._weight, steps, self._taught)

    def _scaled(self, function: Callable[..., Tensor], other: Any) -> Any:
        return (
            self._then(partial(function, other=other))
            if isinstance(other, int | float)
            else function(self.tensor(), other)
        )


def _cross_entropy(input: Any, target: Any, weight: Tensor | None = None, **options: Any) -> Tensor | None:
    """The loss in chunks, or None for arguments it does not cover."""
    options = {key: value for key, value in options.items() if value is not None}
    if not options.get("label_smoothing"):
        options.pop("label_smoothing", None)
    plain = isinstance(input, Logits) and isinstance(target, Tensor) and len(input.shape) == 2
    if not plain or weight is not None or target.is_floating_point() or not options.keys() <= _LOSS_OPTIONS:
        return None
    target = target.to(input.device)
    if input._taught is not None:
        if "label_smoothing" in options:
            return None
        return _lesson(input, input._taught, target, **options)
    fused = input._weight is not None and all(step is Tensor.float for step in input._steps)
    if fused and "label_smoothing" not in options and cut_cross_entropy(input._hidden, input._weight):
        return linear_cross_entropy(input._hidden, input._weight, target, **options)
    chunk = max(CHUNK_LOGITS // input._width, 1)
    return chunked_cross_entropy(input._hidden, target, input._logits, input._parameters, chunk, **options)


def _lesson(
    student: Logits, taught: Taught, target: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """What the student has to learn, over the tokens that count."""
    taught.lessons.append(len(target))
    lesson, teacher, counted = taught.lesson, taught.logits, target != ignore_index
    mine, theirs, target = student._hidden[counted], teacher._hidden[counted], target[counted]

    def summed(rows: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            known = teacher._logits(theirs[part])
        return lesson.losses(known, student._logits(rows), target[part]).sum()

    divisor = target.new_tensor(len(target) if reduction == "mean" else 1)
    return in_chunks(summed, mine, student._parameters, max(CHUNK_LOGITS // student._width, 1), divisor)


def _cast(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype)


def _made(value: Any) -> Any:
    return value.tensor() if isinstance(value, Logits) else value


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor(), name)(*map(_made, others))


# operators are looked up on the class, past __getattr__
for _name in ("add", "radd", "sub", "rsub", "rtruediv", "pow", "neg", "matmul", "lt", "le", "gt", "ge", "len", "iter"):
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))
