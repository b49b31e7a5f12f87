"""The contract of an allocation: (what is known of each layer, budget in bytes) -> a choice for each layer.

A layer's *choices* are the sizes that a method offers for it (a rank, a width of code, a density), each with its bytes
and its predicted loss, by rising bytes; the size None leaves the layer as it is. The word *budget* always means what is
**kept**. An allocation is a plain, editable, reusable record that says exactly what it spends.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from weft.errors import WeftError
from weft.records import Record

__all__ = [
    "Allocator",
    "Budget",
    "Choice",
    "Choices",
    "LayerInfo",
    "Shape",
    "below_reach",
    "bisect_threshold",
    "check_reach",
    "spent",
]


class Shape(tuple[int, int]):
    """(out, in) of a weight, which knows the bytes of one of its numbers: `out, inn = shape; shape.itemsize`."""

    itemsize: int

    def __new__(cls, out_features: int, in_features: int, itemsize: int = 4) -> Shape:
        made = super().__new__(cls, (out_features, in_features))
        made.itemsize = itemsize
        return made

    @property
    def numel(self) -> int:
        """Numbers of the dense matrix."""
        return self[0] * self[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.numel * self.itemsize


class Choice(NamedTuple):
    """One point of a layer's curve: what a size costs, and what it is predicted to lose."""

    size: Any  # a rank, bits, a density ...; None leaves the layer as it is
    bytes: int
    loss: float = 0.0
    method: str = ""  # whose size it is, where the curves of several methods are one


Choices = dict[str, Choice]
"""layer -> what is chosen for it."""


@dataclass(frozen=True)
class LayerInfo:
    """What an allocation may look at. Spectra are None, and losses 0, unless the allocation says that it reads them."""

    shape: Shape
    choices: Sequence[Choice]  # by rising bytes, never empty
    spectrum: Tensor | None = None  # (m,) singular values in the method's own metric, falling
    weight_spectrum: Tensor | None = None  # (m,) singular values of the weight itself
    depth: float = 0.0  # where its block lies: 0 for the first, 1 for the last

    @property
    def sizes(self) -> list[Choice]:
        """The choices that change the layer."""
        return [choice for choice in self.choices if choice.size is not None]

    @property
    def whole(self) -> Choice:
        """The choice that leaves the layer as it is."""
        return next(choice for choice in self.choices if choice.size is None)

    def within(self, nbytes: float) -> Choice:
        """The largest choice of at most so many bytes; the smallest there is, where none is."""
        return self.choices[max(bisect_right(self.choices, nbytes, key=lambda choice: choice.bytes) - 1, 0)]

    def at_rank(self, rank: int) -> Choice:
        """The largest rank up to this one, at least the smallest; dense where factors would not be smaller."""
        ranks = self.sizes
        if not ranks or rank >= ranks[-1].size + ranks[0].size:
            return self.choices[-1]
        return next((choice for choice in reversed(ranks) if choice.size <= rank), ranks[0])


@dataclass(frozen=True)
class Budget:
    """What is kept of the replaced matrices: a share of their bytes, mean bits a weight, or a size of the whole model.

    `Budget.parse` reads 0.6, "60%", "3.5 bits", "500MB" (10^6 bytes), "2GiB".

    Example:
        >>> weft.Budget.parse("60%").value
        0.6
    """

    value: float
    unit: str = "share"  # "share" | "bits" | "bytes"

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """Raises WeftError for anything that is no positive share up to 1, no number of bits and no size."""
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|bits?|[KMGT]i?B|B|)\s*", str(text), re.IGNORECASE)
        if not match:
            raise WeftError(
                f"The budget {text!r} is no share and no size; give what to keep, as 0.6, 60%, '3.5 bits' or 500MB."
            )
        number, unit = float(match[1]), match[2].upper()
        if unit.startswith("BIT"):
            if not 0 < number <= 64:
                raise WeftError(f"The budget {text!r} is out of range: it is the mean bits a weight, above 0.")
            return cls(number, "bits")
        if unit in ("", "%"):
            share = number / 100 if unit else number
            if not 0 < share <= 1:
                raise WeftError(
                    f"The budget {text!r} is out of range: it is the share of parameters kept, above 0 and at most 1."
                )
            return cls(share)
        base = 1024 if "I" in unit else 1000
        return cls(number * base ** "BKMGT".index(unit[0]), "bytes")

    @classmethod
    def read(cls, text: str | float, unit: str) -> float | None:
        """The number that a text means in this unit; None where it means none."""
        try:
            budget = cls.parse(text)
        except WeftError:
            return None
        return budget.value if budget.unit == unit else None

    def allowed(self, shapes: Sequence[Shape], *, other_bytes: int) -> int:
        """How many bytes the matrices may keep together, when all else in the model takes `other_bytes`.

        Raises:
            WeftError: an absolute size that the rest of the model fills by itself.
        """
        total = sum(shape.nbytes for shape in shapes)
        if self.unit == "share":
            return int(self.value * total + 1e-6)  # 0.29 * 100 is 28.999999999999996
        if self.unit == "bits":
            return min(int(self.value * sum(shape.numel for shape in shapes) / 8 + 1e-6), total)
        left = int(self.value - other_bytes)
        if left <= 0:
            raise WeftError(
                f"The budget of {self} is below what cannot be compressed: embeddings, norms and head take "
                f"{other_bytes / 1e6:.4g}MB; give a larger size."
            )
        return min(left, total)

    def __str__(self) -> str:
        if self.unit == "bytes":
            return f"{self.value / 1e6:.15g}MB"
        return f"{self.value:.15g}" + (" bits" if self.unit == "bits" else "")


@dataclass(frozen=True, kw_only=True)
class Allocator(Record):
    """A way to spend a budget, as data.

    Args:
        allocate: (layers by name, budget in bytes, **what it reads beyond `LayerInfo`) -> Choices.
        reads: what it looks at: fields of `LayerInfo` ("spectrum", "weight_spectrum"), the "losses" of choices, and
            functions that try sizes on the model: "measure" (`weft.verbs.placing`), "divergence"
            (`weft.verbs.divergence`).
    """

    kind: str = "allocate"
    allocate: Callable[..., Choices]
    reads: tuple[str, ...] = ()


def spent(choices: Mapping[str, Choice]) -> int:
    """Bytes of all of them together."""
    return sum(choice.bytes for choice in choices.values())


def bisect_threshold(layers: Mapping[str, LayerInfo], budget: int, choices_at: Callable[[float], Choices]) -> Choices:
    """The choices at the largest t in [0, 1] that spend at most `budget`; `choices_at(t)` grows with t.

    Raises:
        WeftError: even t = 0 spends more.
    """
    most = {name: layer.choices[-1] for name, layer in layers.items()}
    if spent(most) <= budget:
        return most
    low, high = 0.0, 1.0
    best = choices_at(low)
    if spent(best) > budget:
        raise below_reach(layers, best, budget)
    if spent(choices_at(high)) <= budget:
        return choices_at(high)
    for _ in range(60):
        middle = (low + high) / 2
        choices = choices_at(middle)
        if spent(choices) <= budget:
            low, best = middle, choices
        else:
            high = middle
    return best


def check_reach(layers: Mapping[str, LayerInfo], budget: int) -> None:
    """Raises WeftError for a budget below the smallest choices together."""
    least = {name: layer.choices[0] for name, layer in layers.items()}
    if spent(least) > budget:
        raise below_reach(layers, least, budget)


def below_reach(layers: Mapping[str, LayerInfo], least: Mapping[str, Choice], budget: int) -> WeftError:
    """The error for a budget below the smallest choices."""
    total = sum(layer.shape.nbytes for layer in layers.values())
    weights = sum(layer.shape.numel for layer in layers.values())
    floor = spent(least)
    return WeftError(
        f"The budget keeps {budget / total:.4f} of the matrices' bytes ({8 * budget / weights:.3f} bits a weight), but "
        f"the smallest sizes take {floor / total:.4f} ({8 * floor / weights:.3f} bits); give at least that (of ranks, "
        "a smaller --round or rank takes less)."
    )
