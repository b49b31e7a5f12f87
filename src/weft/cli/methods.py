"""`weft methods`."""

from __future__ import annotations

from weft.cli.answer import print_json, print_table, work
from weft.cli.options import Json

__all__ = ["command"]


def command(json: Json = False) -> None:
    """List every method: what it does, and its paper."""
    records = work("methods")
    if json:
        print_json(records)
        return
    columns = {"method": "left", "kind": "left", "summary": "left", "paper": "left"}
    print_table(columns, [(r["name"], r["kind"], r["summary"], r["paper"]) for r in records])
