"""The contract of an allocation: (what is known of each layer, budget) -> a rank for each layer, or None for dense.

An allocation is a plain, editable, reusable record that says exactly what it spends. The word *budget* always means
what is **kept**.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.errors import WeftError

__all__ = [
    "Allocation",
    "Budget",
    "LayerInfo",
    "Ranks",
    "below_reach",
    "bisect_threshold",
    "check_ranks",
    "check_reach",
    "dense_or",
    "rank_limit",
    "spend",
    "total_spend",
]

Ranks = dict[str, int | None]
"""layer -> rank, None for dense."""


@dataclass(frozen=True)
class LayerInfo:
    """What an allocation may look at. Beyond the shape, all is None unless the allocation says that it reads it."""

    shape: tuple[int, int]  # (out, in)
    spectrum: Tensor | None = None  # (m,) singular values in the method's own metric, falling
    weight_spectrum: Tensor | None = None  # (m,) singular values of the weight itself
    losses: Tensor | None = None  # (m + 1,) predicted loss after keeping 0 ... m components

    @property
    def size(self) -> int:
        """Parameters of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def unit(self) -> int:
        """Parameters of one rank: out + in."""
        return self.shape[0] + self.shape[1]


@dataclass(frozen=True)
class Budget:
    """What is kept of the replaced matrices: a share of their parameters, or an absolute size of the whole model.

    `Budget.parse` reads 0.6, "60%", "500MB" (10^6 bytes), "2GiB". A share of bytes is the same number, since factors
    keep their matrix's dtype.
    """

    value: float
    unit: str = "share"  # "share" | "bytes"

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """Raises WeftError for anything that is no positive share up to 1 and no size."""
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|B|[KMGT]i?B|)\s*", str(text), re.IGNORECASE)
        if not match:
            raise WeftError(f"The budget {text!r} is no share and no size; give what to keep, as 0.6, 60% or 500MB.")
        number, unit = float(match[1]), match[2].upper()
        if unit in ("", "%"):
            share = number / 100 if unit else number
            if not 0 < share <= 1:
                raise WeftError(
                    f"The budget {text!r} is out of range: it is the share of parameters kept, above 0 and at most 1."
                )
            return cls(share)
        base = 1024 if "I" in unit else 1000
        return cls(number * base ** "BKMGT".index(unit[0]), "bytes")

    def parameters(self, layers: Mapping[str, LayerInfo], *, other_bytes: int, itemsize: int) -> int:
        """How many parameters the matrices may keep together, when all else in the model takes `other_bytes`.

        Raises:
            WeftError: an absolute size that the rest of the model fills by itself.
        """
        total = sum(layer.size for layer in layers.values())
        if self.unit == "share":
            return int(self.value * total + 1e-6)  # 0.29 * 100 is 28.999999999999996
        left = int(self.value - other_bytes) // itemsize
        if left <= 0:
            raise WeftError(
                f"The budget of {self} is below what cannot be compressed: embeddings, norms and head take "
                f"{other_bytes / 1e6:.4g}MB; give a larger size."
            )
        return min(left, total)

    def __str__(self) -> str:
        return f"{self.value:.15g}" if self.unit == "share" else f"{self.value / 1e6:.15g}MB"


@dataclass(frozen=True)
class Allocation(Mapping[str, "int | None"]):
    """Ranks by layer, and the account of what they spend. A mapping: `allocation["model.layers.0.mlp.up_proj"]`."""

    ranks: Ranks
    shapes: Mapping[str, tuple[int, int]]
    budget: str = ""
    allocate: str = ""
    allowed: int = 0  # parameters that the budget allows
    details: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> int | None:
        return self.ranks[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def spent(self) -> int:
        """Parameters that the ranks cost."""
        return sum(spend(LayerInfo(self.shapes[name]), rank) for name, rank in self.ranks.items())

    @property
    def total(self) -> int:
        """Parameters of the dense matrices."""
        return sum(out * inn for out, inn in self.shapes.values())

    def record(self) -> dict[str, Any]:
        """JSON-able: the budget, what is spent of it, and every layer's rank ("dense" where it is left whole)."""
        return {
            "budget": self.budget,
            "allocate": self.allocate,
            "parameters": {"dense": self.total, "allowed": self.allowed, "spent": self.spent},
            "share_spent": self.spent / self.total,
            **self.details,
            "layers": {
                name: {"rank": "dense" if rank is None else rank, "shape": list(self.shapes[name])}
                for name, rank in self.ranks.items()
            },
        }

    def save(self, path: str | Path) -> None:
        """Write the record as JSON; edit its ranks by hand and load it again."""
        Path(path).write_text(json.dumps(self.record(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read a saved, possibly edited record.

        Raises:
            WeftError: a file that is none, or a rank that its matrix cannot have.
        """
        try:
            record = json.loads(Path(path).expanduser().read_text())
            shapes = {name: _shape(entry["shape"]) for name, entry in record["layers"].items()}
            ranks: Ranks = {
                name: None if entry["rank"] == "dense" else entry["rank"] for name, entry in record["layers"].items()
            }
            allowed = int(record.get("parameters", {}).get("allowed", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeftError(
                f"{path} is not an allocation file ({error}); weft compress writes one beside its output."
            ) from error
        check_ranks(ranks, shapes, str(path))
        known = {"budget", "allocate", "parameters", "share_spent", "layers"}
        details = {key: value for key, value in record.items() if key not in known}
        return cls(ranks, shapes, record.get("budget", ""), record.get("allocate", ""), allowed, details)


def check_ranks(ranks: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], source: str) -> None:
    """Raises WeftError for a rank, given by `source`, that its matrix cannot have."""
    for name, rank in ranks.items():
        most = min(shapes[name])
        whole = isinstance(rank, int) and not isinstance(rank, bool)
        if rank is not None and not (whole and 1 <= rank <= most):
            out, inn = shapes[name]
            raise WeftError(
                f"{source} gives {name} the rank {rank!r}, but a {out} x {inn} matrix has ranks from 1 to {most}, "
                "or is left dense."
            )


def _shape(values: Any) -> tuple[int, int]:
    out, inn = values
    return int(out), int(inn)


def spend(layer: LayerInfo, rank: int | None) -> int:
    """Parameters of a layer at a rank; None is dense."""
    return layer.size if rank is None else rank * layer.unit


def rank_limit(layer: LayerInfo, multiple: int = 1) -> int:
    """The largest rank, a multiple of `multiple`, at which factors are smaller than the matrix; 0 if there is none."""
    return (layer.size - 1) // layer.unit // multiple * multiple


def dense_or(layer: LayerInfo, rank: int, multiple: int = 1) -> int | None:
    """`rank` rounded down to a multiple, at least one of them; None where such factors would not be smaller."""
    rounded = max(rank // multiple, 1) * multiple
    return rounded if rounded <= rank_limit(layer, multiple) else None


def bisect_threshold(layers: Mapping[str, LayerInfo], budget: int, ranks_at: Callable[[float], Ranks]) -> Ranks:
    """The ranks at the largest t in [0, 1] that spend at most `budget`; `ranks_at(t)` grows with t.

    Raises:
        WeftError: even t = 0 spends more.
    """
    dense: Ranks = dict.fromkeys(layers)
    if total_spend(layers, dense) <= budget:
        return dense
    low, high = 0.0, 1.0
    best = ranks_at(low)
    if total_spend(layers, best) > budget:
        raise below_reach(layers, best, budget)
    if total_spend(layers, ranks_at(high)) <= budget:
        return ranks_at(high)
    for _ in range(60):
        middle = (low + high) / 2
        ranks = ranks_at(middle)
        if total_spend(layers, ranks) <= budget:
            low, best = middle, ranks
        else:
            high = middle
    return best


def total_spend(layers: Mapping[str, LayerInfo], ranks: Ranks) -> int:
    """Parameters of all layers at these ranks."""
    return sum(spend(layer, ranks[name]) for name, layer in layers.items())


def check_reach(layers: Mapping[str, LayerInfo], budget: int, multiple: int = 1) -> None:
    """Raises WeftError for a budget below the smallest ranks, one `multiple` for each layer."""
    least: Ranks = {name: dense_or(layer, 1, multiple) for name, layer in layers.items()}
    if total_spend(layers, least) > budget:
        raise below_reach(layers, least, budget)


def below_reach(layers: Mapping[str, LayerInfo], least: Ranks, budget: int) -> WeftError:
    """The error for a budget below the smallest ranks."""
    total = sum(layer.size for layer in layers.values())
    floor = total_spend(layers, least)
    return WeftError(
        f"The budget keeps {budget / total:.4f} of the parameters, but the smallest ranks take {floor / total:.4f}; "
        "give at least that, or a smaller --round."
    )
