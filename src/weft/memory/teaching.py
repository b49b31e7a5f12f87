"""A student that learns of a teacher's predictions: the loss of its training step is the lesson, in the labels' place.

Both models see the same tokens, the teacher without a gradient, and neither's tokens x vocabulary matrix is made: their
hidden states wait beside their heads, and the divergence goes through them in chunks (`weft.memory.logits`). The
student's own code still shifts and masks the tokens, so that those with a label are the ones that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.memory.forwards import LeanForward, has_open_head, loss_alone, original, promising
from weft.memory.lean import language_model
from weft.memory.lesson import Lesson
from weft.memory.logits import Logits, Taught

__all__ = ["taught"]

_OF_LOSS = ("labels", "num_items_in_batch", "shift_labels")


@contextmanager
def taught(model: nn.Module, teacher: nn.Module, lesson: Lesson) -> Iterator[None]:
    """The model's loss in training is what it has to learn of the teacher, within the block.

    Args:
        model: a causal language model, given labels.
        teacher: another, of the same vocabulary, on the same device; it is set to evaluation.

    Raises:
        WeftError: a model without a linear output head at hand, or two of different widths.
    """
    student, known = (_with_head(m) for m in (model, teacher))
    widths = [m.get_output_embeddings().out_features for m in (student, known)]
    if widths[0] != widths[1]:
        raise WeftError(
            f"The teacher's vocabulary has {widths[1]} tokens and the model's {widths[0]}: a teacher must predict the "
            "same tokens; give the model that this one was made of."
        )
    known.eval()
    before = student.__dict__.get("forward")
    student.forward = LeanForward(student, _Lessons(known, lesson))
    try:
        yield
    finally:
        del student.forward
        if before is not None:
            student.forward = before


class _Lessons:
    """The forward of the student: the teacher's first."""

    __name__ = "taught"

    def __init__(self, teacher: Any, lesson: Lesson) -> None:
        self.teacher, self.lesson = teacher, lesson

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if not module.training or kwargs.get("labels") is None:
            return original(module, *args, **kwargs)
        told = Taught(self.lesson, self._logits(args, kwargs))
        output = loss_alone(module, *args, taught=told, **kwargs)
        if not told.lessons:
            raise WeftError(
                f"The loss of {type(module).__name__} is no cross-entropy of its logits, so that it cannot learn of a "
                "teacher; leave --teacher out."
            )
        return output

    def _logits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Logits:
        inputs = {key: value for key, value in kwargs.items() if key not in _OF_LOSS} | {"use_cache": False}
        with torch.no_grad(), promising(self.teacher):
            logits = self.teacher(*args, **inputs).logits
        if not isinstance(logits, Logits):
            raise WeftError(
                f"The logits of the teacher, {type(self.teacher).__name__}, are more than its head and what is done to "
                "each of them; give another teacher."
            )
        return logits


def _with_head(model: nn.Module) -> Any:
    found = language_model(model)
    if found is None or not has_open_head(found):
        raise WeftError(
            f"{type(model).__name__} has no linear output head at hand, so that it cannot teach or be taught."
        )
    return found
