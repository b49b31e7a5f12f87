"""What weft says when something is wrong: one sentence that names the cause and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["WeftError", "nearest", "unknown"]


class WeftError(ValueError):
    """A mistake the user can mend. The command line prints its message alone, without a traceback, and exits with 2.

    Example:
        >>> try:
        ...     weft.Budget.parse("0")
        ... except weft.WeftError as mistake:
        ...     print(mistake)
        The budget '0' is out of range: it is the share of parameters kept, above 0 and at most 1.
    """


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first; all of them when nothing is close and there are few."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    return close or known[:count]


def unknown(what: str, name: str, names: Iterable[str]) -> WeftError:
    """The error for a name that is in no table, with its nearest neighbours."""
    return WeftError(
        f"There is no {what} called {name!r}; the nearest are: {', '.join(nearest(name, names)) or 'none'}."
    )
