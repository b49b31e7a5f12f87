"""The record of a published optimizer: what makes it, and what the verbs must know of it beforehand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from weft.optim.parameters import split_parameters
from weft.records import Record

__all__ = ["Optimizer", "optimizer"]

GIVEN = {"model", "model_or_groups", "params", "parameters", "lr", "weight_decay", "seed", "base", "decay"}
"""What the recipe of a run says, and no option does."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(Record):
    """One optimizer, as data; calling it calls `make`.

    Args:
        make: (model or groups, lr=..., weight_decay=..., seed=..., **options) -> torch.optim.Optimizer.
        ranked: it keeps its state in a subspace of some `rank`.
        backward: it takes gradients; without them the training loop of the verbs cannot run it.
        loop: why it wants a loop of its own, a sentence; "" where the verbs offer it.
        by_size: (numbers in the matrices of the blocks, options) by rising numbers: from so many on, the published
            options of that size take the place of `defaults`. Below the first there is no published size.
        on_factors: options whose published values are others where the matrices are trained as factors.
        periods: options that are steps between two events: `weft pretrain` and `weft finetune` take a twentieth of the
            run where that is less than the published number.
    """

    PERIOD: ClassVar[float] = 0.05

    make: Callable[..., Any]
    ranked: bool = False
    backward: bool = True
    loop: str = ""
    by_size: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    on_factors: Mapping[str, Any] = field(default_factory=dict)
    periods: tuple[str, ...] = ()

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What `make` makes."""
        return self.make(*args, **options)

    @property
    def rate(self) -> float:
        """The published peak learning rate."""
        return float(inspect.signature(self.make).parameters["lr"].default)

    @property
    def by_width(self) -> bool:
        """Whether it scales rates and decay by width, from a narrow `base` model."""
        return "base" in inspect.signature(self.make).parameters

    def for_run(self, steps: int) -> dict[str, Any]:
        """The periods for a run of so many steps."""
        published = {name: self.defaults[name] for name in self.periods}
        return {name: max(1, min(every, int(self.PERIOD * steps))) for name, every in published.items()}

    def for_size(self, model: nn.Module) -> dict[str, Any]:
        """The published options for a model as large as this one."""
        if not self.by_size:
            return {}
        numbers = sum(matrix.numel() for _, matrix in split_parameters(model)[0])
        return dict([options for least, options in self.by_size if numbers >= least][-1])

    def record(self) -> dict[str, Any]:
        """What `weft methods` lists, JSON-able; options by size where the published ones differ."""
        sizes = [{"from": least, **options} for least, options in self.by_size]
        return super().record() | {"ranked": self.ranked, "backward": self.backward, "by_size": sizes}


def optimizer(make: Callable[..., Any], name: str, summary: str, paper: str, **fields: Any) -> Optimizer:
    """The record of what `make` makes, whose defaults are those of its own options."""
    own = [p for p in inspect.signature(make).parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = {p.name: p.default for p in own if p.name not in GIVEN and p.default is not p.empty}
    return Optimizer(
        name=name, kind="optimizer", summary=summary, paper=paper, make=make, defaults=defaults,
        ranked="rank" in defaults, periods=tuple(n for n in ("refresh",) if defaults.get(n, 1) != 1), **fields,
    )  # fmt: skip
