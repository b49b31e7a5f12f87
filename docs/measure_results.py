"""What measures predict, as tables for docs/results.md: from benchmarks/results/measures_*.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
HAPPENED = {
    "rise_svd": "the rise of the loss when a layer alone is cut by svd to a quarter of its bytes",
    "rise_rtn": "the rise of the loss when a layer alone is rounded by rtn to 2 bits",
    "forgotten": "the rise of the loss on the first text after LoRA on another",
    "useful": "the fall of the loss of a task's labels after LoRA on a set of records: of the task, of it with a label "
    "of another, of another task, in shares of its own",
}
"""What was measured, by its name in the files."""


def measure_tables() -> list[str]:
    """A table of correlations for each thing that happened, a column a model, and what predicts nothing."""
    found = {
        one["settings"]["model"]: one
        for file in sorted(RESULTS.glob("measures_*.json"))
        for one in [json.loads(file.read_text(encoding="utf-8"))]
    }
    if not found:
        return []
    settings = [one["settings"] for one in found.values()]
    words = (
        "Spearman's correlation of a figure with what happened, and its interval of 95 % by bootstrap, on "
        + ", ".join(f"`{s['model']}` ({s['layers']} layers, {s['windows']} windows of {s['window']})" for s in settings)
        + f"; {settings[0]['text']}, one half for the measures and the other for the losses; {settings[0]['date']}, "
        f"torch {settings[0]['torch']}, {settings[0]['device']}. The number of a layer's parameters is what any figure "
        "has to beat. `predicted` is weft's own predicted loss of that very cut."
    )
    lines = [words]
    for what, meaning in HAPPENED.items():
        columns = {name: one["correlations"][what] for name, one in found.items() if what in one["correlations"]}
        if columns:
            lines += ["", *_table(meaning, columns)]
    return lines


def _table(meaning: str, columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    figures = list(dict.fromkeys(key for column in columns.values() for key in column))
    strength = {key: _mean([abs(c[key]["rho"]) for c in columns.values() if _known(c.get(key))]) for key in figures}
    told = [key for key in figures if any(_told(c[key]) for c in columns.values() if key in c)]
    counts = ", ".join(f"{max(int(one['n']) for one in c.values())} of {name}" for name, c in columns.items())
    lines = [
        f"With {meaning} ({counts}):",
        "",
        f"| figure | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for key in sorted(told, key=lambda key: -strength[key]):
        lines.append(f"| {_said(key)} | {' | '.join(_cell(c.get(key)) for c in columns.values())} |")
    rest = ", ".join(_said(key) for key in figures if key not in told)
    return [*lines, "", f"Told from chance on no model: {rest}."] if rest else lines


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _known(one: Mapping[str, float] | None) -> bool:
    """Whether there was enough to tell a correlation from."""
    return one is not None and one["rho"] is not None


def _told(one: Mapping[str, float]) -> bool:
    """Whether the interval leaves 0 out."""
    return _known(one) and (one["low"] > 0 or one["high"] < 0)


def _cell(one: Mapping[str, float] | None) -> str:
    if one is None or not _known(one):
        return "–"
    cell = f"{one['rho']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
    return f"**{cell}**" if _told(one) else cell


def _said(key: str) -> str:
    name = "predicted" if key.startswith("predicted_") else "error" if key.startswith("error_") else key
    return name.replace("_", " ")
