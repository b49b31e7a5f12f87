"""The committed results of code_tuning.py as tables, for docs/results.md."""

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


def _words(arguments: dict[str, Any]) -> str:
    steps = f"{arguments['steps']} steps of {arguments['batch']} x {arguments['window']} tokens of Python sources"
    return (
        f"`{arguments['model']}` in {arguments['bits']} bits, groups of {arguments['group']}. GPTQ's codes are tuned "
        f"by {steps} with the dense model as the teacher (rate {arguments['lr']:g}): by pv-tuning in several ways, by "
        "tiny-training, and by int2.1, whose factors come on top; qvgen trains the dense model towards codes. The "
        "number behind a way is its rate of codes. One seed."
    )


def _columns(arguments: dict[str, Any]) -> list[str]:
    return ["", "bits a weight", *(f"perplexity, {name}" for name in arguments["texts"]), "bytes"]


def _cells(row: dict[str, Any]) -> list[str]:
    figures = [f"{value:.2f}" if value < 1000 else f"{value:.3g}" for value in row["perplexity"].values()]
    return [row["name"], f"{row['bits']:.3f}", *figures, f"{row['bytes']:,}"]
