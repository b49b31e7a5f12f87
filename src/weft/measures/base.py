"""What a measure is: a record with a function of what it looks at.

    of          value is called with                            what gets figures
    matrix      W (out, in)                                     that matrix
    pair        W, W0 (out, in), as in another model            that matrix
    input       moments, the statistics named in `needs`        that linear layer
    gradient    x (tokens, in), g (tokens, out) of one text     that linear layer
    hidden      H (tokens, d) of one text                       the model
    weights     model                                           layers by name, "" for the model
    model       model, batches of texts                         layers by name, "" for the model
    models      model, other model                              layers by name, "" for the model

x are a layer's inputs, g the gradients of its outputs, H the last hidden states. Figures of texts are means over the
texts that give a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from weft.records import Record

__all__ = ["SUBJECTS", "Figures", "Measure", "Subject"]

Figures = Mapping[str, float]
"""Numbers by their names; NaN where there is none."""


class Subject(NamedTuple):
    """What a measure may look at."""

    looks_at: str
    data: bool  # whether there must be texts
    pair: bool  # whether there must be another model


SUBJECTS = {
    "matrix": Subject("weights", data=False, pair=False),
    "pair": Subject("pairs of models", data=False, pair=True),
    "input": Subject("activations", data=True, pair=False),
    "gradient": Subject("gradients", data=True, pair=False),
    "hidden": Subject("texts", data=True, pair=False),
    "weights": Subject("weights", data=False, pair=False),
    "model": Subject("activations", data=True, pair=False),
    "models": Subject("pairs of models", data=False, pair=True),
}
"""By the name in `Measure.of`."""


@dataclass(frozen=True, kw_only=True)
class Measure(Record):
    """A published measure.

    Args:
        value: (what it looks at, **options) -> figures by name; see the table above.
        reads: figure -> how it reads, in a few words; these are all that it gives of a matrix or a layer.
        cost: what it takes, in a few words.
        of: what `value` is called with, a name of `SUBJECTS`.
        needs: statistics of `weft.stats` that an "input" is given as.
        whole: (figures of each layer by name, model) -> figures of the model.
        reads_model: the same as `reads`, of the model's figures.
    """

    value: Callable[..., Any]
    reads: Mapping[str, str] = field(default_factory=dict)
    cost: str
    of: str = "matrix"
    needs: tuple[str, ...] = ()
    whole: Callable[[Mapping[str, Figures], nn.Module], Figures] | None = None
    reads_model: Mapping[str, str] = field(default_factory=dict)
    kind: str = "measure"

    def __post_init__(self) -> None:
        if self.of not in SUBJECTS:
            raise ValueError(f"the measure {self.name!r} is of {self.of!r}, not of one of {', '.join(SUBJECTS)}")

    @property
    def pair(self) -> bool:
        """Whether it compares a model with another."""
        return SUBJECTS[self.of].pair

    @property
    def data(self) -> bool:
        """Whether it must see texts."""
        return SUBJECTS[self.of].data

    @property
    def looks_at(self) -> str:
        """Weights, gradients, activations, texts or pairs of models."""
        return SUBJECTS[self.of].looks_at

    def record(self) -> dict[str, Any]:
        """What `weft methods` lists, JSON-able."""
        own = {"looks_at": self.looks_at, "cost": self.cost, "reads": {**self.reads, **self.reads_model}}
        return {**super().record(), **own}
