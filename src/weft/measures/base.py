"""What a measure is: a record with a function of a matrix, or of a matrix and what it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weft.records import Record

__all__ = ["Measure"]


@dataclass(frozen=True, kw_only=True)
class Measure(Record):
    """A published measure of weights.

    Args:
        value: (W (out, in), **options) -> figures by name; of a pair, (W, W0 (out, in), **options).
        reads: figure -> how it reads, in a few words; these are all that `value` gives.
        pair: whether it compares a matrix with what it was in another model.
    """

    value: Callable[..., Mapping[str, float]]
    reads: Mapping[str, str]
    pair: bool = False
    kind: str = "measure"
