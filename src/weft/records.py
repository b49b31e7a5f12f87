"""What the registry lists: a record for everything published that weft has, and the tables that hold them.

    Record    the common head: name, kind, summary, paper, defaults
    Table     the records of one room by name
    tables()  every room's table: what `weft.methods()` lists

`weft.register` adds to a table, and so do installed packages, by the entry points of the group "weft.methods".
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from weft.errors import WeftError, unknown

__all__ = ["Record", "Table", "load_entry_points", "register", "tables"]

ROOMS = ("weft.methods", "weft.optim", "weft.merging", "weft.grafts", "weft.allocate")
"""The rooms that have a table."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The head of every record.

    Args:
        name: as in the list and on the command line.
        kind: what it is for, in one word: "compress", "adapt", "optimizer", "merge" ...
        summary: one line.
        paper: authors, year and identifier; "weft" where it is ours and a search found no other source.
        defaults: the published hyperparameters, which are also the names of the options that it takes.
    """

    name: str
    kind: str
    summary: str
    paper: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults overridden by what the user gave. Raises WeftError for an option that the record has not."""
        strange = sorted(set(given) - set(self.defaults))
        if strange:
            known = ", ".join(self.defaults) or "none"
            raise WeftError(f"The method {self.name!r} has no option {strange[0]!r}; its options are: {known}.")
        return {**self.defaults, **given}

    def record(self) -> dict[str, Any]:
        """What `weft methods` lists, JSON-able."""
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "paper": self.paper,
            "defaults": {key: _plain(value) for key, value in self.defaults.items()},
        }


R = TypeVar("R", bound=Record)


class Table(dict[str, R], Generic[R]):
    """The records of one room, by name, in the order of their list.

    Args:
        holds: the class of the records.
        records: those that weft comes with.
    """

    def __init__(self, holds: type[R], records: Iterable[R] = ()) -> None:
        super().__init__()
        self.holds = holds
        for record in records:
            self.add(record)

    def add(self, record: R) -> R:
        """Add a record, and return it. Raises WeftError where its name is another's."""
        if self.get(record.name, record) is not record:
            raise WeftError(
                f"There is a {self[record.name].kind} method called {record.name!r} already; choose another."
            )
        self[record.name] = record
        return record

    def find(self, name: str | R, *kinds: str) -> R:
        """The record of that name (or the record itself), of one of these kinds (none: any).

        Raises WeftError with the nearest names.
        """
        if isinstance(name, self.holds):
            return name
        load_entry_points()
        among = {key: record for key, record in self.items() if not kinds or record.kind in kinds}
        if name not in among:
            raise unknown(f"method to {' or '.join(kinds)}" if kinds else "method", str(name), among)
        return among[str(name)]


def tables() -> list[Table[Any]]:
    """Every room's table, what installed packages add included."""
    load_entry_points()
    return [_table(importlib.import_module(room)) for room in ROOMS]


def register(record: Record) -> Record:
    """Add a record to the table that holds its sort, and return it.

    Raises:
        WeftError: it is no record, or its name is taken.
    """
    for room in ROOMS:
        table = _table(importlib.import_module(room))
        if isinstance(record, table.holds):
            table.add(record)
            return record
    raise WeftError(f"{record!r} is no record that weft knows; give a Method, an Optimizer, a Merger or a Graft.")


_loaded: set[str] = set()


def load_entry_points() -> None:
    """Register what installed packages offer, once a process: groups "weft.terms" and "weft.methods".

    A package that fails to load is named in the error, with the cause.
    """
    from weft.terms import register_term  # the one room below that has something to register

    for group, add in (("weft.terms", register_term), ("weft.methods", register)):
        for point in entry_points(group=group):
            if point.value in _loaded:
                continue
            _loaded.add(point.value)
            try:
                add(point.load())
            except Exception as error:
                raise WeftError(
                    f"The package {point.dist.name if point.dist else point.value} offers {point.value} to weft, which "
                    f"cannot be used ({error}); mend or uninstall it."
                ) from error


def _table(room: Any) -> Table[Any]:
    return next(value for value in vars(room).values() if isinstance(value, Table))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str | list | tuple | dict) else str(value)
