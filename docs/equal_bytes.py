"""Methods at equal bytes on models that others trained, for README.md; see generate.py."""

from __future__ import annotations

import json
from typing import Any

from results import RESULTS, table

FILES = {"frontier_smollm2_mixed.jsonl": "SmolLM2-135M", "frontier_ref_mixed.jsonl": "Llama-29M"}
ROWS = {
    "llm-compressor, gptq": "GPTQ of llm-compressor 0.14",
    "gptq, clipped, widths by layer": "`gptq`, a width for each layer",
    "yaqa, by table, widths by layer": "`yaqa` by tables, a width for each layer",
    "auto": "`auto`",
}
"""Rows of benchmarks/frontier.py by what they are called here."""
BUDGETS = (2.75, 3.25, 4.25)

Line = dict[str, Any]


def equal_bytes_table() -> list[str]:
    """Perplexity on both texts by method, at each budget of each model: means of the draws of calibration text."""
    found = {file: _lines(file) for file in FILES}
    heads = [(file, budget) for file in FILES for budget in BUDGETS if _at(found[file], "auto", budget)]
    names = [f"{FILES[file].split('-')[0]}, {budget:g}" for file, budget in heads]
    cells = [[words, *(_cell(_at(found[file], row, b), b) for file, b in heads)] for row, words in ROWS.items()]
    dense = {words: [x for x in found[file] if x["row"] == "dense"] for file, words in FILES.items()}
    whole = " and ".join(f"{_pair(lines)} for {words}" for words, lines in dense.items())
    first = next(iter(found.values()))[0]
    words = (
        f"Perplexity on held-out Python / on WikiText-2 at so many bits a weight of the linear layers, everything that "
        f"is stored counted; calibrated on {first['windows']} windows of {first['window']} tokens, half of each. "
        f"llm-compressor gets the most bits of one width for all that fit. Dense: {whole}."
    )
    return [words, "", *table(["", *names], cells)]


def _lines(file: str) -> list[Line]:
    return [json.loads(line) for line in (RESULTS / file).read_text(encoding="utf-8").splitlines()]


def _at(lines: list[Line], row: str, budget: float) -> list[Line]:
    return [x for x in lines if (x["row"], x["budget"]) == (row, budget) and "bits" in x]


def _cell(draws: list[Line], budget: float) -> str:
    """A dash where it was not measured; what it took, where that is far below the budget."""
    if not draws:
        return "–"
    bits = draws[0]["bits"]
    return _pair(draws) + (f" ({bits:.2f} bits)" if bits < budget - 0.1 else "")


def _pair(draws: list[Line]) -> str:
    """Of both texts, means over draws to three digits."""
    means = [sum(d["perplexity"][text] for d in draws) / len(draws) for text in draws[0]["perplexity"]]
    return " / ".join(f"{mean:.2f}" if mean < 20 else f"{mean:.1f}" for mean in means)
