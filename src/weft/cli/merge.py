"""`weft merge`."""

from __future__ import annotations

from weft.cli.answer import print_facts, print_json, work
from weft.cli.options import Json, Model, Out

__all__ = ["command"]


def command(model: Model, out: Out, json: Json = False) -> None:
    """Collapse every sum of terms to one matrix: a plain model that anything reads."""
    result = work("merge", model=model, out=out)
    print_json(result) if json else print_facts(result)
