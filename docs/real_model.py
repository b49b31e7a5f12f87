"""docs/real-model.md: a real model through the verbs, of what benchmarks/real_model.py has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "real_model.json"


def real_model_page() -> str:
    """A row for each command: what lies on the disk after it, and perplexity on held-out text."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = [
        "# A real model through the verbs",
        "",
        f"SmolLM2-135M-Instruct and the validation text of WikiText-2. `python benchmarks/real_model.py MODEL --text "
        f"{found['text']}` runs these commands and measures after each: the first half of the text is calibrated and "
        f"trained on (eight windows of 512 tokens, or twenty steps of 512 tokens, eight where the "
        f"command says so), {found['windows']} windows of 512 "
        "tokens of the second half judge. That is little text, chosen so that all of it runs on two cores in minutes; "
        "more of it, and more steps, give better figures. MODEL is the directory of the model.",
        "",
        "| command | MB on the disk | perplexity | seconds |",
        "|---|---|---|---|",
        *(_row(row) for row in found["rows"]),
        "",
        f"Measured by weft {found['weft']} with torch {found['torch']} on {found['threads']} thread, with other work "
        "on the machine: the seconds are no benchmark.",
    ]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    size = f"{row['bytes'] / 1e6:.0f}" if row.get("bytes") else ""
    loss = f"{row['perplexity']:.1f}" if "perplexity" in row else ""
    command = f"`{row['command']}`" if row["command"] else "the model as it is"
    return f"| {command} | {size} | {loss} | {row.get('seconds', 0):.0f} |"
