"""Plots as inline SVG: line charts and heat maps, drawn with nothing but strings, so that a report is one file.

Hovering a line or a cell shows what it is (`<title>`). Colours come from one blue ramp, light to dark, for things
that have an order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "heat_map", "line_chart", "ramp"]

_LIGHT, _DARK = (176, 208, 242), (12, 52, 112)
_DASHES = ("", "6 3", "2 2", "10 3 2 3", "1 4", "12 5", "6 2 1 2 1 2")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 240, 52, 14, 30, 40


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    marked: bool = False  # whether each point is drawn, for few points
    dash: int = 0  # which of the patterns tells it from others without colour; 0 is a whole line


def ramp(position: float) -> str:
    """The colour at `position` (0 light, 1 dark)."""
    position = min(max(position, 0.0), 1.0)
    return "#" + "".join(f"{round(a + (b - a) * position):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log: bool = False, legend: bool = False
) -> str:
    """An SVG line chart; the axes cover the data.

    Args:
        log: a logarithmic vertical axis; values that are not positive are left out.
        legend: name the series beneath the plot.
    """
    lines = [_positive(s) if log else s for s in series]
    xs = [x for s in lines for x in s.x]
    ys = [math.log10(y) if log else y for s in lines for y in s.y]
    if not xs:
        return ""
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _decades(min(ys), max(ys)) if log else _ticks(min(ys), max(ys))
    across = _Scale(min(xs[0], x_ticks[0], *xs), max(x_ticks[-1], *xs), _LEFT, _WIDTH - _RIGHT)
    upward = _Scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), _HEIGHT - _BOTTOM, _TOP)
    body = [_x_axis(x_ticks, across, x_label), _y_axis(y_ticks, upward, y_label, log)]
    body += [_line(s, across, upward, log) for s in lines]
    height = _HEIGHT + (16 * len(lines) + 4 if legend else 0)
    if legend:
        body += [_legend(s, _HEIGHT + 10 + 16 * i) for i, s in enumerate(lines)]
    return _svg(_WIDTH, height, title, body)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    unit: str,
    words: Sequence[Sequence[str | None]] = (),
) -> str:
    """An SVG heat map of shares between 0 and 1, darker for more; None leaves a cell empty. `words` stand in the cells
    in place of the shares.
    """
    longest = max((len(text or "") for row in words for text in row), default=0)
    cell, tall, left, top = max(62, 12 + 6 * longest), 22, 12 + 7 * max((len(r) for r in rows), default=1), 56
    body = [_text(left + cell * (j + 0.5), top - 8, name, "middle", 10) for j, name in enumerate(columns)]
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + tall * i
        body.append(_text(left - 6, y + 15, name, "end", 10))
        for j, value in enumerate(row):
            if value is not None:
                text = (words[i][j] if words else None) or f"{value:.0%}"
                said = f"{name} {columns[j]}: {value:.1%} {unit}"
                body.append(_cell((left + cell * j, y), (cell - 2, tall - 2), value, text, said))
    return _svg(left + cell * len(columns) + 10, top + tall * len(rows) + 10, title, body)


@dataclass(frozen=True)
class _Scale:
    """From data to pixels, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def _positive(series: Series) -> Series:
    kept = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y > 0]
    return Series(series.name, [x for x, _ in kept], [y for _, y in kept], series.color, series.marked, series.dash)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    raw = (high - low) / count or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    step = math.ceil((last - first) / 6)
    return [float(d) for d in range(first, last + step, step)]


def _x_axis(ticks: list[float], across: _Scale, label: str) -> str:
    base = _HEIGHT - _BOTTOM
    parts = [_text(across(t), base + 15, f"{t:.6g}", "middle", 10) for t in ticks]
    return "".join([*parts, _text((_LEFT + _WIDTH - _RIGHT) / 2, base + 32, label, "middle", 11)])


def _y_axis(ticks: list[float], upward: _Scale, label: str, log: bool) -> str:
    parts = []
    for t in ticks:
        y = upward(t)
        words = f"{t:.6g}" if not log else f"{10**t:,.0f}" if 0 <= t < 5 else f"1e{t:.0f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 3.5, words, "end", 10))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'<g transform="rotate(-90 12 {middle:.1f})">{_text(12, middle, label, "middle", 11)}</g>'
    return "".join([*parts, turned])


def _line(series: Series, across: _Scale, upward: _Scale, log: bool) -> str:
    points = [(across(x), upward(math.log10(y) if log else y)) for x, y in zip(series.x, series.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    name, dash = escape(series.name), _dash(series)
    line = f'<polyline points="{path}" stroke="{series.color}"{dash}><title>{name}</title></polyline>'
    if not series.marked:
        return line
    words = [f"{name}: {x:.4g}, {y:.4g}" for x, y in zip(series.x, series.y, strict=True)]
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{series.color}"><title>{said}</title></circle>'
        for (x, y), said in zip(points, words, strict=True)
    ]
    return "".join([line, *dots])


def _legend(series: Series, y: float) -> str:
    ends = f'x1="{_LEFT}" x2="{_LEFT + 22}" y1="{y - 4:.1f}" y2="{y - 4:.1f}"'
    swatch = f'<line {ends} stroke="{series.color}" stroke-width="2"{_dash(series)}/>' * (len(series.x) > 1)
    if series.marked:
        swatch += f'<circle cx="{_LEFT + 11}" cy="{y - 4:.1f}" r="3.2" fill="{series.color}"/>'
    return swatch + _text(_LEFT + 30, y, series.name, "start", 11)


def _dash(series: Series) -> str:
    pattern = _DASHES[series.dash % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _cell(at: tuple[float, float], size: tuple[float, float], value: float, text: str, said: str) -> str:
    (x, y), (width, height) = at, size
    ink = "#fff" if value > 0.45 else "#12263f"
    return (
        f'<g><title>{escape(said)}</title><rect x="{x:.0f}" y="{y:.0f}" width="{width}" height="{height}" rx="3" '
        f'fill="{ramp(value)}"/><text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle" '
        f'font-size="10" style="fill:{ink}">{escape(text)}</text></g>'
    )


def _text(x: float, y: float, words: str, anchor: str, size: int) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    heading = f'<text class="title" x="8" y="17" font-size="13">{escape(title)}</text>'
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{heading}{"".join(body)}</svg>'
    )
