"""What a way to choose data is: a record with a function of what the examples are embedded as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from weft.records import Record

__all__ = ["Chosen", "Selection"]


class Chosen(NamedTuple):
    """Examples in the order in which they were chosen, best first."""

    order: Tensor  # (count,) int64
    scores: Tensor  # (n,) of every example, kept or not; the larger the sooner


@dataclass(frozen=True, kw_only=True)
class Selection(Record):
    """A published way to choose examples.

    Args:
        choose: (E (n, d) of unit length, count, query (q, d) of unit length or None, seed, **options) -> `Chosen`.
        reads: how a score reads, in a few words.
        query: whether it needs examples of what the data is for.
        figures: what it reads of a record, in the place of an embedding: a function of the record -> numbers (n a
            record, E is (records, n) then), which raises KeyError, TypeError or ValueError where they are not there.
        asks: the fields that `figures` reads, in words.
    """

    choose: Callable[..., Chosen]
    reads: str
    query: bool = False
    figures: Callable[[Mapping[str, Any]], list[float]] | None = None
    asks: str = ""
    kind: str = "select"
