"""Allocation: what each layer is given, as a record that says what it spends; saved, edited by hand, and used again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.allocate.base import Choice, Shape
from weft.errors import WeftError
from weft.files import write_json

__all__ = ["Allocation"]


@dataclass(frozen=True)
class Allocation(Mapping[str, Any]):
    """Sizes by layer, and the account of what they spend. A mapping: `allocation["model.layers.0.mlp.up_proj"]` is that
    layer's size (a rank, bits, a density; a list of them for a chain of methods), None where it is left as it is.
    """

    choices: Mapping[str, Choice]
    shapes: Mapping[str, Shape]
    budget: str = ""
    allocate: str = ""
    allowed: int = 0  # bytes that the budget allows
    details: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> Any:
        return self.choices[layer].size

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def spent(self) -> int:
        """Bytes that the sizes take."""
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def total(self) -> int:
        """Bytes of the dense matrices."""
        return sum(shape.nbytes for shape in self.shapes.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a weight, of everything stored for these matrices."""
        return 8 * self.spent / max(sum(shape.numel for shape in self.shapes.values()), 1)

    def record(self) -> dict[str, Any]:
        """JSON-able: the budget, what is spent of it, and every layer's size ("dense" where left whole) and bytes."""
        return {
            "budget": self.budget,
            "allocate": self.allocate,
            "bytes": {"dense": self.total, "allowed": self.allowed, "spent": self.spent},
            "share_spent": self.spent / self.total,
            "bits_per_weight": self.bits_per_weight,
            **self.details,
            "layers": {
                name: {
                    "size": "dense" if choice.size is None else choice.size,
                    **({"method": choice.method} if choice.method else {}),
                    "bytes": choice.bytes,
                    "shape": list(self.shapes[name]),
                }
                for name, choice in self.choices.items()
            },
        }

    def save(self, path: str | Path) -> None:
        """Write the record as JSON; edit its sizes by hand and load it again."""
        write_json(Path(path), self.record())

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read a saved, possibly edited record; what older versions wrote ("rank") too.

        Raises:
            WeftError: a file that is none.
        """
        try:
            record = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            layers = {name: _read(entry) for name, entry in record["layers"].items()}
            allowed = int(record.get("bytes", {}).get("allowed", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeftError(
                f"{path} is not an allocation file ({error}); weft compress writes one beside its output."
            ) from error
        known = {"budget", "allocate", "bytes", "parameters", "share_spent", "bits_per_weight", "layers"}
        return cls(
            {name: choice for name, (choice, _) in layers.items()},
            {name: shape for name, (_, shape) in layers.items()},
            record.get("budget", ""),
            record.get("allocate", ""),
            allowed,
            {key: value for key, value in record.items() if key not in known},
        )


def _read(entry: Mapping[str, Any]) -> tuple[Choice, Shape]:
    size, (out, inn) = entry.get("size", entry.get("rank")), entry["shape"]
    if size is None:
        raise KeyError("size")
    chosen = Choice(None if size == "dense" else size, int(entry.get("bytes", 0)), method=entry.get("method", ""))
    return chosen, Shape(int(out), int(inn))
