"""The pages of reports: read without colour, without the network, and on a narrow screen."""

from __future__ import annotations

import re

from weft.runs.report.pages import page, table
from weft.runs.report.plots import Series, heat_map, line_chart


def test_lines_are_told_apart_without_colour() -> None:
    lines = [Series(str(i), [0, 1], [1, 2], "#000", dash=i) for i in range(5)]
    drawn = line_chart("a", lines, "x", "y", legend=True)
    patterns = [re.search('stroke-dasharray="([^"]*)"', line) for line in re.findall("<polyline[^>]*>", drawn)]
    assert len({pattern and pattern[1] for pattern in patterns}) == len(lines)


def test_a_single_point_is_a_dot_in_the_legend_too() -> None:
    drawn = line_chart("a", [Series("here", [1], [2], "#000", marked=True)], "x", "y", legend=True)
    assert drawn.count("<circle") == 2 and "<line x1" not in drawn


def test_decades_are_written_as_one_says_them() -> None:
    drawn = line_chart("a", [Series("s", [0, 1], [1e-2, 1e3], "#000")], "x", "y", log=True)
    assert all(f">{said}<" in drawn for said in ("1e-2", "1", "10", "1,000"))


def test_a_page_refers_to_nothing_outside_and_its_wide_parts_scroll_by_themselves() -> None:
    grid = heat_map("m", ["a"], ["b"], [[0.5]], "of all")
    text = page("t", "s", [table(["name", "value"], [["a", 1.0]]), f'<div class="scroll map">{grid}</div>'])
    assert not re.search(r"https?://|<link|src=|@import|url\(", text)
    assert all(wide in text for wide in ('<div class="scroll"><table>', '<div class="scroll map"><svg'))
