"""Progress on stderr: a bar with the time left on a terminal, nothing where stderr is a file, so that logs stay
readable.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

__all__ = ["say", "track"]

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a progress bar on stderr while they are consumed.

    Args:
        what: what is being done, a word or two.
        total: how many items there are, where `items` has no length.
    """
    bar: Iterable[T] = tqdm(items, desc=what, total=total, file=sys.stderr, disable=None, dynamic_ncols=True)
    return bar


def say(sentence: str) -> None:
    """One line about what happens next, on stderr."""
    tqdm.write(sentence, file=sys.stderr)
