"""The page of `weft compress --report`: what each layer was given and why, and what other budgets would have given.

Its frontier is predicted: every curve of the survey solved at a row of budgets, by the greedy on hulls (Shoham and
Gersho, 1988), for all methods together and for each alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from weft.allocate import Allocation, Choice, LayerInfo, greedy
from weft.runs.report.pages import figures, page, section, table
from weft.runs.report.plots import Series, line_chart
from weft.runs.report.spectra import block_grid

__all__ = ["frontier", "frontier_page"]

_COLORS = ("#0c3470", "#5b9bd5", "#c26a2e", "#3f8f6b", "#8a5aa8", "#b8963e", "#8a94a3")
_STEPS = 16
_LONG = 12  # letters of a name in a cell
_WIDEST = 8.0  # bits, or as many as a matrix got: a cell of as many a weight is dark

Found = Mapping[str, LayerInfo]


def frontier(layers: Found, method: str | None = None, widest: float = _WIDEST) -> list[tuple[float, float]]:
    """(bits a weight, predicted loss a token in nats) at a row of budgets; of one method alone, or of all together.

    A layer that the method offers nothing stays as it is. No budget is above `widest` bits a weight.
    """
    curves = {name: _of(info.choices, method) for name, info in layers.items()}
    weights = sum(info.shape.numel for info in layers.values())
    low, high = (sum(points[i].bytes for points in curves.values()) for i in (0, -1))
    high = min(high, int(widest * weights / 8))
    points = []
    for i in range(_STEPS + 1):
        found = greedy.solve(curves, int(low + (high - low) * i / _STEPS)) if high >= low else None
        if found is not None:
            spent = sum(choice.bytes for choice in found.values())
            points.append((8 * spent / weights, _nats(found.values())))
    return points


def frontier_page(model: str, allocation: Allocation, layers: Found, measured: Mapping[str, float]) -> str:
    """The whole page.

    Args:
        layers: the curves that the survey found.
        measured: loss a token of the calibration text, "before" and "after".
    """
    chosen = allocation.choices
    methods = Counter(choice.method or "dense" for choice in chosen.values())
    words = ", ".join(f"{name} for {count}" for name, count in methods.most_common())
    letters = _letters(name for name, _ in methods.most_common())
    named = "".join(f" {letter} is {name}." for name, letter in letters.items() if letter != name)
    return page(
        f"Compressing {model}",
        f"{len(chosen)} matrices at {allocation.bits_per_weight:.3f} bits a weight, everything stored for them counted "
        f"(budget {allocation.budget or 'as given'}): {words}.",
        [
            section(
                "What each layer was given",
                "Method and size by block; the darker, the more bits a weight. A pair is a width and a rank." + named,
                block_grid("bits a weight", *_shares(allocation), _words(chosen, letters)),
            ),
            section("Predicted and measured", _PREDICTED, table(["", "nats a token"], _losses(chosen, measured))),
            section(
                "What other budgets would give",
                "Predicted loss against bits a weight, of every method alone and of all together, on a logarithmic "
                "scale; the marked point is what was chosen. Predictions are worst where they are large.",
                figures([_chart(allocation, layers)]),
            ),
            section(
                "Where the loss lies",
                "Share of the predicted loss, relative to the layer that loses most.",
                block_grid("predicted loss, relative", _relative(chosen), "of the largest"),
            ),
            section("Every matrix", "Click a heading to sort.", table(_HEADINGS, _rows(allocation, layers))),
        ],
    )


_PREDICTED = (
    "Predicted: half the sum of tr(D^T G D X) over the layers, the second-order estimate that is minimised; "
    "each layer's error is taken alone and on the inputs of the model as it was. Measured: the rise of the loss on the "
    "calibration text."
)
_HEADINGS = ("matrix", "shape", "method", "size", "bits a weight", "bytes", "predicted loss", "choices")


def _of(choices: Sequence[Choice], method: str | None) -> list[Choice]:
    return [choice for choice in choices if method is None or choice.size is None or choice.method == method]


def _nats(choices: Any) -> float:
    """Half of the sum of the losses: the estimate of what the loss a token rises by."""
    return sum(choice.loss for choice in choices) / 2


def _bits(allocation: Allocation, name: str) -> float:
    return 8 * allocation.choices[name].bytes / allocation.shapes[name].numel


def _shares(allocation: Allocation) -> tuple[dict[str, float], str]:
    widest = max(_WIDEST, *(_bits(allocation, name) for name in allocation))
    return {name: _bits(allocation, name) / widest for name in allocation}, f"of {widest:.3g} bits"


def _letters(methods: Iterable[str]) -> dict[str, str]:
    """What a cell calls each method: its name, or a letter where a name is long."""
    names = list(methods)
    return dict(zip(names, ascii_uppercase if any(len(name) > _LONG for name in names) else names, strict=False))


def _words(chosen: Mapping[str, Choice], letters: Mapping[str, str]) -> dict[str, str]:
    return {
        name: "dense" if c.size is None else f"{letters.get(c.method, c.method)} {_size(c.size)}"
        for name, c in chosen.items()
    }


def _size(size: Any) -> str:
    return ", ".join(map(str, size)) if isinstance(size, list | tuple) else str(size)


def _relative(chosen: Mapping[str, Choice]) -> dict[str, float]:
    top = max((choice.loss for choice in chosen.values()), default=0.0) or 1.0
    return {name: choice.loss / top for name, choice in chosen.items()}


def _losses(chosen: Mapping[str, Choice], measured: Mapping[str, float]) -> list[list[Any]]:
    rise = measured["after"] - measured["before"]
    return [
        ["predicted rise", _nats(chosen.values())],
        ["measured rise", rise],
        ["loss before", measured["before"]],
        ["loss after", measured["after"]],
    ]


def _chart(allocation: Allocation, layers: Found) -> str:
    names = list(dict.fromkeys(c.method for info in layers.values() for c in info.choices if c.method))
    widest = max(_WIDEST, allocation.bits_per_weight)
    curves = {"all together": frontier(layers, None, widest)} if len(names) > 1 else {}
    curves |= {name: frontier(layers, name, widest) for name in names}
    series = [
        Series(name, *_columns(points), _COLORS[i % len(_COLORS)], dash=i)
        for i, (name, points) in enumerate(curves.items())
    ]
    here = [(allocation.bits_per_weight, _nats(allocation.choices.values()))]
    series.append(Series("chosen", *_columns(here), "#b3261e", marked=True))
    return line_chart("predicted loss", series, "bits a weight", "nats a token", log=True, legend=True)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _rows(allocation: Allocation, layers: Found) -> list[list[Any]]:
    return [
        [
            name,
            "x".join(map(str, allocation.shapes[name])),
            choice.method or "dense",
            "" if choice.size is None else _size(choice.size),
            _bits(allocation, name),
            choice.bytes,
            choice.loss / 2,
            len(layers[name].choices),
        ]
        for name, choice in allocation.choices.items()
    ]
