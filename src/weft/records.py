"""What the registry lists: a record for everything published that weft has, and the tables that hold them.

    Record    the common head: name, kind, summary, paper, defaults
    Table     the records of one room by name
    tables()  every room's table: what `weft.methods()` lists
    find()    a record by its name, in whichever room

`weft.register` adds to a table, and so do installed packages, by the entry points of the group "weft.methods".
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from weft.errors import WeftError, unknown

__all__ = ["Record", "Table", "find", "load_entry_points", "parsed_value", "register", "tables"]

ROOMS = (
    *("weft.methods", "weft.optim", "weft.merging", "weft.grafts", "weft.allocate", "weft.measures", "weft.scaling"),
    *("weft.select", "weft.memory"),
)
"""The rooms that have a table."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The head of every record.

    Args:
        name: as in the list and on the command line.
        kind: what it is for, in one word: "compress", "adapt", "optimizer", "merge" ...
        summary: one line.
        paper: authors, year and identifier; "weft" where it is ours and a search found no other source.
        defaults: the published hyperparameters, which are also the names of the options that it takes; None is a number
            that follows from the layer or the run.
        least: of options for which not every number from 0 on makes sense: the smallest that does.
    """

    name: str
    kind: str
    summary: str
    paper: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults overridden by what the user gave. Raises WeftError for an option that the record has not, and
        for a value of another sort than its default, or below zero where that is above, or below its least.
        """
        strange = sorted(set(given) - set(self.defaults))
        if strange:
            known = ", ".join(self.defaults) or "none"
            raise WeftError(f"The method {self.name!r} has no option {strange[0]!r}; its options are: {known}.")
        for key, value in given.items():
            wanted = _wanted(value, self.defaults[key])
            if wanted is not None:
                raise WeftError(f"The option {key} of {self.name!r} is {value!r}: give {wanted}.")
            if value is not None and value < self.least.get(key, value):
                raise WeftError(f"The option {key} of {self.name!r} is {value!r}: give {self.least[key]} or more.")
        whole = {k for k, v in given.items() if isinstance(v, float) and isinstance(self.defaults[k], int)}
        return {**self.defaults, **{key: int(value) if key in whole else value for key, value in given.items()}}

    def record(self) -> dict[str, Any]:
        """What `weft methods` lists, JSON-able."""
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "paper": self.paper,
            "defaults": {key: _plain(value) for key, value in self.defaults.items()},
        }


def _wanted(value: Any, default: Any) -> str | None:
    """What an option takes instead of this value, by its default; None where it takes it, or no default says."""
    if value is None:
        return None
    if default is None:  # stands for a number that follows from the layer or the run
        odd = isinstance(value, bool | str) or (isinstance(value, int | float) and not value >= 0)
        return "a number from 0 on, or leave it out" if odd else None
    if isinstance(default, bool):
        return None if value in (True, False) else "true or false"
    if isinstance(default, int | float) and (isinstance(value, bool | str | list | tuple | dict) or value != value):
        return f"a number, such as {default}"
    if isinstance(default, int | float) and value < 0 < default:
        return f"a number such as {default}, and none below zero"
    if isinstance(default, int) and isinstance(value, float) and not value.is_integer():
        return f"a whole number, such as {default}"
    return f"a word, such as {default!r}" if isinstance(default, str) and not isinstance(value, str) else None


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
        """The record of that name, of one of these kinds (none: any); a record itself is added, and given back.

        Raises WeftError with the nearest names.
        """
        if isinstance(name, self.holds):
            return self.add(name)
        self.known(str(name))  # which looks at installed packages for a name that is not here
        return _among([self], str(name), kinds)

    def known(self, name: str) -> R | None:
        """The record of that name, those of installed packages included, or None."""
        if name not in self:
            load_entry_points()
        return self.get(name)


def find(name: str | Record, *kinds: str) -> Record:
    """The record of that name, of one of these kinds, in whichever room; a record itself is added to its table.

    Raises WeftError with the nearest names.
    """
    return register(name) if isinstance(name, Record) else _among(tables(), name, kinds)


def parsed_value(text: str) -> Any:
    """The value of an option that is given as text: JSON where it is JSON, the text itself otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def tables() -> list[Table[Any]]:
    """Every room's table, what installed packages add included."""
    load_entry_points()
    return _tables()


def register(offered: Any) -> Any:
    """Add a record to the table that holds its sort, or a class to the structures that a term can be; it is returned.

    What is registered has a name like any other: in Python, on the command line, in saved directories.

    Args:
        offered: a record (`weft.methods.Method`, `weft.optim.Optimizer`, ...), or a subclass of `weft.terms.Term`.

    Raises:
        WeftError: it is neither, or its name is taken.

    Example:
        >>> method = dataclasses.replace(weft.methods.METHODS["svd"], name="my-svd")
        >>> weft.register(method).name
        'my-svd'
    """
    from weft.terms import register_term

    if isinstance(offered, type):
        return register_term(offered)
    for table in _tables():
        if isinstance(offered, table.holds):
            return table.add(offered)
    sorts = ", ".join(table.holds.__name__ for table in _tables())
    raise WeftError(f"{offered!r} is nothing that weft can register; give a record ({sorts}) or a subclass of Term.")


_asked: set[tuple[str, str]] = set()
_broken: dict[str, str] = {}


def load_entry_points() -> None:
    """Register what installed packages offer under the groups "weft.terms" and "weft.methods", once a process.

    A package that cannot be used is named in a warning, with the cause, and again where a name is not found; all
    others, and weft itself, work on.
    """
    for point in _offered(tuple(sys.path)):
        if (point.group, point.value) in _asked:
            continue
        _asked.add((point.group, point.value))
        try:
            register(point.load())
        except Exception as error:  # whatever a stranger's module does when it is imported
            package = point.dist.name if point.dist else point.value
            _broken[point.name] = f"The package {package} offers {point.value} to weft, which cannot be used: "
            _broken[point.name] += " ".join((str(error) or repr(error)).split())
            warnings.warn(f"{_broken[point.name]}. Mend or uninstall it.", stacklevel=2)


@cache
def _offered(path: tuple[str, ...]) -> list[EntryPoint]:
    """By the packages of a search path, which takes a hundredth of a second to read."""
    return [point for group in ("weft.terms", "weft.methods") for point in entry_points(group=group)]


def _among(tables: Sequence[Table[R]], name: str, kinds: Sequence[str]) -> R:
    found = {key: r for table in tables for key, r in table.items() if not kinds or r.kind in kinds}
    if name in found:
        return found[name]
    if name in _broken:
        raise WeftError(f"{_broken[name]}.")
    listed = " or ".join(part for part in (", ".join(kinds[:-1]), *kinds[-1:]) if part)
    other = next((table[name].kind for table in _tables() if name in table), None)
    if other is not None:
        raise WeftError(
            f"There is no method to {listed} called {name!r}: it is of kind {other}; weft methods lists all by kind."
        )
    raise unknown(f"method to {listed}" if kinds else "method", name, found)


def _tables() -> list[Table[Any]]:
    rooms = map(importlib.import_module, ROOMS)
    return [value for room in rooms for value in vars(room).values() if isinstance(value, Table)]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str | list | tuple | dict) else str(value)
