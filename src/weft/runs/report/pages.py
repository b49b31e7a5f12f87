"""A report as one HTML file: style, sections and tables, with no reference to anything outside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from weft.errors import WeftError

__all__ = ["commands_list", "figures", "page", "report_path", "section", "table"]

_STYLE = """
:root { color-scheme: light dark; }
:root, svg { --ink: #12263f; --soft: #5b6b80; --line: #dfe5ec; --panel: #f6f8fb; --ground: #fff; }
@media (prefers-color-scheme: dark) { /* plots keep their light ground, on which their colours were chosen */
  :root { --ink: #dde6f0; --soft: #9db0c4; --line: #2a3645; --panel: #1a2430; --ground: #10161f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 32px 24px 64px; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 80ch; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; }
svg { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font-family: inherit; } svg .title { fill: var(--ink); font-weight: 600; }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; } svg polyline:hover { stroke-width: 3.5; }
svg .grid { stroke: var(--line); }
.scroll { overflow-x: auto; background: /* a shade at the right edge, where there is more */
          linear-gradient(to left, var(--ground) 50%, transparent) right / 36px 100% no-repeat local,
          linear-gradient(to left, var(--line), transparent) right / 18px 100% no-repeat scroll; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--ground); }
th.words, td.words { text-align: left; } td.words { white-space: normal; min-width: 24ch; max-width: 80ch; }
th[data-sorts] { cursor: pointer; } tbody tr:hover td { background: var(--panel); }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
.map svg { max-width: none; display: block; }
@media (max-width: 600px) { body { padding: 16px 10px 40px; } h1 { font-size: 21px; } svg { width: 100%; }
                             .map svg { width: auto; } th, td { padding: 4px 8px; } td.words { min-width: 18ch; } }
"""

# Clicking a heading, or Enter on it, sorts by that column, numbers as numbers; an arrow says which and how.
_SCRIPT = """
document.querySelectorAll("th[data-sorts]").forEach(th => {
  const sort = () => {
    const body = th.closest("table").tBodies[0], i = th.cellIndex, up = th.getAttribute("aria-sort") !== "ascending";
    const key = row => row.cells[i].dataset.value ?? row.cells[i].textContent;
    const sign = up ? 1 : -1, number = value => value !== "" && !isNaN(value);
    const by = (a, b) => number(a) && number(b) ? a - b : String(a).localeCompare(String(b));
    th.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    [...body.rows].sort((a, b) => sign * by(key(a), key(b))).forEach(row => body.append(row));
  };
  th.tabIndex = 0;
  th.addEventListener("click", sort);
  th.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
"""


def report_path(path: str | os.PathLike[str], forms: Mapping[str, str]) -> Path:
    """Where a report goes; `forms` are the endings that it may have, and what each stands for.

    Raises:
        WeftError: another ending, or a directory that does not exist.
    """
    path = Path(path).expanduser()
    if path.suffix not in forms:
        known = " or ".join(f"{ending} ({what})" for ending, what in forms.items())
        raise WeftError(f"The report {path} must end in {known}.")
    if not path.absolute().parent.is_dir():
        raise WeftError(f"There is no directory {path.parent} to write the report to.")
    return path


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>\n{''.join(sections)}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def section(heading: str, explanation: str, body: str) -> str:
    """A heading, a sentence that says how to read what follows, and the body (HTML)."""
    said = f"<p>{escape(explanation)}</p>" if explanation else ""
    return f"<h2>{escape(heading)}</h2>{said}{body}\n"


def figures(plots: Sequence[str]) -> str:
    """Plots side by side, as many as fit."""
    return f'<div class="figures">{"".join(plots)}</div>'


def commands_list(lines: Sequence[str]) -> str:
    """Lines to be copied into a shell."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that sorts when a heading is clicked; floats with four significant digits, integers grouped by
    thousands, sentences on the left.
    """
    long = [any(isinstance(row[i], str) and len(row[i]) > _LONG for row in rows) for i in range(len(headings))]
    kinds = [' class="words"' if i and of_words else "" for i, of_words in enumerate(long)]
    head = "".join(
        f"<th data-sorts{kind}>{escape(heading)}</th>" for heading, kind in zip(headings, kinds, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_td, row, kinds))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_LONG = 40  # characters of a cell: more wrap


def _td(cell: Any, kind: str = "") -> str:
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return f"<td{kind}>{escape(str(cell))}</td>"
    words = f"{cell:,.0f}" if isinstance(cell, int) or abs(cell) >= 1000 else f"{cell:.4g}"
    return f'<td data-value="{cell}">{words}</td>'
