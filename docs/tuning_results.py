"""The committed results of code_tuning.py and teaching.py as tables, for docs/results.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

COMMAND = "code_tuning.py --text wikitext=FILE --steps 60 --window 128 --code-rates 0.03"

Table = Callable[[list[str], list[list[str]]], list[str]]


def tuning_tables(table: Table) -> list[str]:
    """What training wins for codes of few bits, a table a model."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("code_tuning*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        arguments = found["arguments"]
        lines += ["", _words(arguments), "", *table(_columns(arguments), [_cells(row) for row in found["rows"]])]
    return lines[1:]


def teaching_table(table: Table) -> list[str]:
    """What a dense teacher adds to recovery."""
    found = json.loads((RESULTS / "teaching.json").read_text(encoding="utf-8"))
    arguments, rows = found["arguments"], found["rows"]
    rates = ", ".join(f"{rate:g}" for rate in arguments["rates"])
    words = (
        f"`{arguments['model']}` at {arguments['budget']} of its bytes, all that is left trained by "
        f"{arguments['steps']} steps of {arguments['batch']} x {arguments['window']} tokens of Python sources; mean "
        "perplexity of "
        f"{arguments['seeds']} seeds at the best rate of {rates}, ± half the range. The teacher is the dense model; "
        "states are those after each block, as `--teacher-features 1`. Rows of one compression have equal bytes."
    )
    ways = list(dict.fromkeys((row["compressed"], row["way"]) for row in rows))
    cells = [_taught([row for row in rows if (row["compressed"], row["way"]) == way]) for way in ways]
    return [words, "", *table(["compressed by", "trained on", *_texts(arguments), "bytes"], cells)]


def _taught(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of a way at its best rate, of all seeds, as one."""
    best = min(rows, key=lambda row: (row.get("seed", 0), row["perplexity"]["python"])).get("rate")
    kept = [row for row in rows if row.get("rate") == best]
    figures = [[row["perplexity"][text] for row in kept] for text in kept[0]["perplexity"]]
    return [
        kept[0]["compressed"] or "dense",
        kept[0]["way"] or "nothing",
        *(f"{sum(f) / len(f):.4g}" + (f" ± {(max(f) - min(f)) / 2:.2g}" if len(f) > 1 else "") for f in figures),
        f"{kept[0]['bytes']:,}",
    ]


def _words(arguments: dict[str, Any]) -> str:
    steps = f"{arguments['steps']} steps of {arguments['batch']} x {arguments['window']} tokens of Python sources"
    return (
        f"`{arguments['model']}` in {arguments['bits']} bits, groups of {arguments['group']}. GPTQ's codes are tuned "
        f"by {steps} with the dense model as the teacher (rate {arguments['lr']:g}): by pv-tuning in several ways, by "
        "tiny-training, and by int2.1, whose factors come on top; qvgen trains the dense model towards codes. The "
        "number behind a way is its rate of codes. One seed."
    )


def _columns(arguments: dict[str, Any]) -> list[str]:
    return ["", "bits a weight", *_texts(arguments), "bytes"]


def _texts(arguments: dict[str, Any]) -> list[str]:
    return [f"perplexity, {name}" for name in arguments["texts"]]


def _cells(row: dict[str, Any]) -> list[str]:
    figures = [f"{value:.2f}" if value < 1000 else f"{value:.3g}" for value in row["perplexity"].values()]
    return [row["name"], f"{row['bits']:.3f}", *figures, f"{row['bytes']:,}"]
