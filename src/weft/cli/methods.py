"""`weft methods`."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

from weft.cli.answer import print_json, print_table, work
from weft.cli.options import Json

__all__ = ["command"]


def command(json: Json = False) -> None:
    """List everything published that weft has, kind by kind: what it does, and its paper."""
    records = work("methods")
    if json:
        print_json(records)
        return
    columns = {"name": "left", "summary": "left", "paper": "left"}
    for kind, group in groupby(records, key=itemgetter("kind")):
        print_table(columns, [(r["name"], r["summary"], r["paper"]) for r in group], title=f"\n{kind}")
