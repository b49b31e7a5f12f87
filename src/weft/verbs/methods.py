"""`weft methods`: everything published that weft has, with its paper and its defaults."""

from __future__ import annotations

from typing import Any

from weft import methods

__all__ = ["run"]


def run() -> list[dict[str, Any]]:
    """One record an item, kind after kind: name, kind, summary, paper, defaults, and what else its sort tells."""
    listed: list[dict[str, Any]] = methods()
    return listed
