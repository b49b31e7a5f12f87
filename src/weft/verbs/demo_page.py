"""The page of `weft demo`: the table, quality against budget, the allocation, the spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from weft.runs.report.pages import commands_list, figures, page, section, table
from weft.runs.report.plots import Series, line_chart
from weft.runs.report.spectra import block_grid, spectra_charts

if TYPE_CHECKING:
    from weft.verbs.inspect import Report

__all__ = ["Curves", "demo_page"]

Curves = dict[str, dict[float, float]]
"""method -> share kept -> perplexity."""

_COLORS = ("#8a94a3", "#5b9bd5", "#0c3470")  # from the background to the foreground
_HEADINGS = {
    "perplexity": "perplexity",
    "parameters": "parameters",
    "bytes": "MB",
    "tokens_per_second": "tokens / s",
}


def demo_page(
    spectra: Report,
    stages: Sequence[Mapping[str, Any]],
    allocation: Mapping[str, Any],
    curves: Curves,
    generated: str,
    commands: Sequence[str],
) -> str:
    """The whole page: `stages` and `curves` as `weft.verbs.demo.run` gives them, `allocation` as in allocation.json,
    and the commands that do the same.
    """
    shown = [{**stage, "bytes": stage["bytes"] / 1e6} for stage in stages]
    rows = [[stage["name"], *(stage[key] for key in _HEADINGS)] for stage in shown]
    return page(
        f"Compressing {spectra.model}",
        f"{len(allocation['layers'])} matrices, of whose parameters {allocation['share_spent']:.1%} are kept.",
        [
            section(
                "What was done",
                "These commands, on one machine, from a small model that comes with weft.",
                commands_list(commands),
            ),
            section(
                "What was measured",
                "Perplexity on text that neither calibration nor training has seen; tokens a second while reading it.",
                table(["", *_HEADINGS.values()], rows),
            ),
            section(
                "Quality against budget",
                "Perplexity as a multiple of the dense model's, by the share of the matrices' parameters that is kept, "
                "without training and on fewer windows than the table; lower is better. Of the methods, svd sees no "
                "text, the others are calibrated.",
                figures([_budget_chart(curves)]),
            ),
            section(
                "Where the budget went",
                "Share of each matrix's parameters that the allocation keeps; 100 % is a matrix left dense.",
                block_grid(
                    f"allocate {allocation['allocate']}, budget {allocation['budget']}", _kept(allocation), "kept"
                ),
            ),
            section(
                "Spectra of the dense model",
                "Singular values, one line a layer, light for the first and dark for the last.",
                figures(spectra_charts(spectra.spectra)),
            ),
            section(
                "Reloaded in a new process",
                "import weft; AutoModelForCausalLM.from_pretrained; greedy decoding.",
                f"<pre>{escape(generated)}</pre>",
            ),
        ],
    )


def _budget_chart(curves: Curves) -> str:
    series = [
        Series(name, list(points), [p / points[1.0] for p in points.values()], color, marked=True, dash=i)
        for i, ((name, points), color) in enumerate(zip(curves.items(), _COLORS, strict=True))
    ]
    return line_chart("quality by budget", series, "share kept", "perplexity / dense", legend=True)


def _kept(allocation: Mapping[str, Any]) -> dict[str, float]:
    layers = allocation["layers"]
    numbers = {name: entry["shape"][0] * entry["shape"][1] for name, entry in layers.items()}
    width = allocation["bytes"]["dense"] / sum(numbers.values())  # bytes of a number
    return {name: entry["bytes"] / (width * numbers[name]) for name, entry in layers.items()}
