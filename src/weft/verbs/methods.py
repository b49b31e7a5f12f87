"""`weft methods`: every method there is, with its paper and its defaults."""

from __future__ import annotations

from typing import Any

from weft.methods import METHODS

__all__ = ["run"]


def run() -> list[dict[str, Any]]:
    """One record a method, in the list's order: name, kind, summary, paper, needs, allocate, defaults."""
    return [method.record() for method in METHODS.values()]
