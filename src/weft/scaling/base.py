"""What a scaling law is: a record with a formula, the quantities that it takes, and the range it was fitted in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import WeftError, unknown
from weft.records import Record

__all__ = ["Law", "Quantity", "number"]

_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Quantity:
    """A number that a law takes.

    Args:
        meaning: what it counts, with its unit.
        low: the least value that the law was fitted on.
        high: the largest.
        default: what it is where none is given; None where it must be.
    """

    meaning: str
    low: float = 0.0
    high: float = math.inf
    default: float | None = None


@dataclass(frozen=True, kw_only=True)
class Law(Record):
    """A published scaling law as a calculator.

    Args:
        takes: its quantities by name.
        formula: (quantities by name) -> figures by name, JSON-able.
        caution: a sentence on what the law was not made for.
    """

    takes: Mapping[str, Quantity]
    formula: Callable[..., Mapping[str, Any]]
    caution: str
    kind: str = "law"

    def predict(self, **given: str | float | None) -> dict[str, Any]:
        """What the law says of these quantities.

        Args:
            given: each a number, or its words: "1B", "20e9", "1.5T".

        Returns:
            {"law", "paper", "given", figures by name ..., "outside": sentences on what lies beyond the range of the
            law's own runs, "caution"}.

        Raises:
            WeftError: a quantity is missing, none of the law's, or no positive number.

        Example:
            >>> round(weft.scaling.LAWS["step-law"].predict(parameters="1B", tokens="100B")["lr"], 5)
            0.00166
        """
        values = self._read({name: value for name, value in given.items() if value is not None})
        return {
            "law": self.name,
            "paper": self.paper,
            "given": values,
            **self.formula(**values),
            "outside": [
                f"{name} = {values[name]:.4g} lies outside {q.low:.4g} to {q.high:.4g}, where the law was fitted."
                for name, q in self.takes.items()
                if not q.low <= values[name] <= q.high
            ],
            "caution": self.caution,
        }

    def _read(self, given: Mapping[str, str | float]) -> dict[str, float]:
        values = {name: quantity.default for name, quantity in self.takes.items()}
        for name, value in given.items():
            if name not in values:
                raise unknown(f"quantity of the law {self.name!r}", name, values)
            values[name] = number(value, name)
        missing = [name for name, value in values.items() if value is None]
        if missing:
            meaning = self.takes[missing[0]].meaning
            raise WeftError(f"The law {self.name!r} needs {missing[0]}: {meaning}, such as 1B or 2e9.")
        return {name: value for name, value in values.items() if value is not None}


def number(value: str | float, name: str = "value") -> float:
    """A positive number from its words: 1e9, "1B", "350M", "1.5T", "20_000".

    Raises WeftError where it is none.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_.]*(?:e[+-]?[0-9]+)?)\s*([kmbgt]?)\s*", str(value).lower())
    try:
        read = float(match[1]) * _SUFFIXES[match[2]] if match else float("nan")
    except ValueError:
        read = float("nan")
    if not (math.isfinite(read) and read > 0):
        raise WeftError(f"{name} must be a positive number such as 2e9, 350M, 1B or 1.5T, not {value!r}.")
    return read
