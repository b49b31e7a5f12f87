"""How measures get what they look at: a matrix at a time, a layer's streamed moments, or one text after another.

chosen      names -> records, checked against what there is to look at
Looked      what there is: a model, texts, another model
beyond      figures of the measures that do not look at one matrix, by layer, "" for the model
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from weft.errors import WeftError, unknown
from weft.measures import MEASURES, Measure
from weft.stats.calibrate import Batch
from weft.stats.groups import Collected
from weft.stats.reached import reached
from weft.stats.texts import gradients_by_text, last_hidden
from weft.terms.layers import linear_layers

__all__ = ["Looked", "OfInput", "beyond", "chosen", "of_matrix", "whole"]


def chosen(
    wanted: Sequence[str | Measure], *, pair: bool, data: bool, options: Mapping[str, Any] | None = None
) -> list[Measure]:
    """The records, with options for those that have them; without a name, those of pairs where there is another model.

    Raises WeftError for an unknown name, with the nearest, for a measure that lacks what it looks at, and for an option
    that none of them has.
    """
    # a record may be a known one with other options, which no table holds
    found = [one if isinstance(one, Measure) else MEASURES.find(one, "measure") for one in wanted]
    for measure in found:
        if measure.pair and not pair:
            raise WeftError(f"The measure {measure.name!r} compares two models: say which other one, by --against.")
        if measure.data and not data:
            what = "a text's gradients" if measure.of == "gradient" else "what a model makes of a text"
            raise WeftError(f"The measure {measure.name!r} looks at {what}: give some, by --data FILE.")
    found = found or [measure for measure in MEASURES.values() if measure.pair and pair]
    return [_with(measure, options) for measure in _checked(found, options)] if options else found


def _checked(measures: list[Measure], options: Mapping[str, Any]) -> list[Measure]:
    known = [name for measure in measures for name in measure.defaults]
    for name in options:
        if name not in known:
            raise unknown("option of these measures", name, known)
    return measures


def _with(measure: Measure, options: Mapping[str, Any]) -> Measure:
    own = measure.options({name: value for name, value in options.items() if name in measure.defaults})
    for name, value in own.items():
        if isinstance(value, int | float) and value <= 0:
            raise WeftError(f"The option {name} of {measure.name!r} is {value}: give a number above 0.")
    return replace(measure, defaults=own)


@dataclass
class Looked:
    """What there is to look at.

    Args:
        layers: names or patterns of the linear layers; None for all.
        needs: statistics that are collected of them, where there are texts.
    """

    model: nn.Module
    layers: str | Sequence[str] | None = None
    batches: Sequence[Batch] = ()
    other: nn.Module | None = None
    needs: Sequence[str] = ()
    linear: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.linear = linear_layers(self.model, self.layers)
        except WeftError:
            if self.layers is not None or self.batches:
                raise
            self.linear = {}  # a model of embeddings alone

    @cached_property
    def moments(self) -> Mapping[str, Mapping[str, Tensor]]:
        """layer -> its statistics, collected when they are asked for; none without texts."""
        if not self.batches or not self.needs:
            return {}
        there = reached(self.model, list(self.linear), self.needs, self.batches)
        return Collected(self.model, self.batches, self.needs, there)


def of_matrix(measures: Iterable[Measure], name: str, W: Tensor, W0: Tensor | None) -> dict[str, float]:
    """What the measures of a matrix, and of a pair, say of W (out, in) that was W0."""
    found: dict[str, float] = {}
    for measure in measures:
        if measure.of == "matrix":
            found |= measure.value(W, **measure.defaults)
        elif measure.of == "pair":
            if W0 is None or W0.shape != W.shape:
                there = "no such matrix" if W0 is None else f"one of {W0.shape[0]} x {W0.shape[1]}"
                raise WeftError(f"The other model has {there} as {name}: compare a model with what it was made from.")
            found |= measure.value(W, W0.to(W.device), **measure.defaults)
    return found


class OfInput:
    """(moments) -> what the measures of an input say of it; once for layers that are fed the very same tensor."""

    def __init__(self, measures: Iterable[Measure]) -> None:
        self.measures = [measure for measure in measures if measure.of == "input"]
        self._last: tuple[Tensor, dict[str, float]] | None = None

    def __call__(self, moments: Mapping[str, Tensor]) -> dict[str, float]:
        if not self.measures:
            return {}
        shared = moments[self.measures[0].needs[0]]
        if self._last is None or self._last[0] is not shared:
            found: dict[str, float] = {}
            for measure in self.measures:
                found |= measure.value(moments, **measure.defaults)
            self._last = (shared, found)
        return dict(self._last[1])


def beyond(looked: Looked, measures: Sequence[Measure]) -> dict[str, dict[str, float]]:
    """The figures of the measures that look at texts or whole models: by layer, "" for the model."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for measure in measures:
        if measure.of in _WAYS:
            for name, figures in _WAYS[measure.of](looked, measure).items():
                found[name] |= figures
    return found


def whole(
    model: nn.Module, measures: Iterable[Measure], matrices: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """The figures of the model that measures make of those of its layers."""
    found: dict[str, float] = {}
    for measure in measures:
        rows = {name: row for name, row in matrices.items() if measure.reads.keys() <= row.keys()}
        if measure.whole is not None and rows:
            found |= measure.whole(rows, model)
    return found


def _gradient(looked: Looked, measure: Measure) -> dict[str, dict[str, float]]:
    texts: dict[str, list[Mapping[str, float]]] = defaultdict(list)

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        texts[name].append(measure.value(x, g, **measure.defaults))

    gradients_by_text(looked.model, looked.batches, looked.linear, visit)
    return {name: _mean(rows) for name, rows in texts.items()}


def _hidden(looked: Looked, measure: Measure) -> dict[str, dict[str, float]]:
    rows = (measure.value(H, **measure.defaults) for H in last_hidden(looked.model, looked.batches))
    return {"": _mean(rows)}


def _weights(looked: Looked, measure: Measure) -> dict[str, dict[str, float]]:
    return dict(measure.value(looked.model, **measure.defaults))


def _model(looked: Looked, measure: Measure) -> dict[str, dict[str, float]]:
    return dict(measure.value(looked.model, looked.batches, **measure.defaults))


def _models(looked: Looked, measure: Measure) -> dict[str, dict[str, float]]:
    return dict(measure.value(looked.model, looked.other, **measure.defaults))


def _mean(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over the texts that give a number; NaN where none does."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            values[key] += [] if math.isnan(value) else [float(value)]
    return {key: math.fsum(found) / len(found) if found else math.nan for key, found in values.items()}


_WAYS: Mapping[str, Any] = {
    "gradient": _gradient,
    "hidden": _hidden,
    "weights": _weights,
    "model": _model,
    "models": _models,
}
"""What a measure is of -> (what there is, the measure) -> figures by layer, for those that look at no single matrix."""
