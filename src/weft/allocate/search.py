"""What searches over configurations share: genes, each of which takes one of its options, and trials that are measured
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.allocate.base import Choices, spent
from weft.errors import WeftError

__all__ = ["Configuration", "Divergence", "Trials", "draw"]

Configuration = tuple[int, ...]
"""Which option each gene takes."""
Divergence = Callable[[Sequence[Mapping[str, Any]]], Sequence[float]]


@dataclass
class Trials:
    """Genes, what their configurations cost, and what was measured of some of them.

    Args:
        genes: the options of each, by rising bytes: choices of the layers that it stands for.
        divergence: (cuts, each a mapping layer -> size) -> how far the model's predictions move.
    """

    genes: Sequence[Sequence[Choices]]
    divergence: Divergence
    measured: dict[Configuration, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bytes = [[spent(option) for option in options] for options in self.genes]

    def choices(self, configuration: Configuration) -> Choices:
        """Of every layer."""
        taken = (options[i] for options, i in zip(self.genes, configuration, strict=True))
        return {name: choice for option in taken for name, choice in option.items()}

    def nbytes(self, configuration: Configuration) -> int:
        """Of all layers together."""
        return sum(own[i] for own, i in zip(self.bytes, configuration, strict=True))

    def features(self, configurations: Sequence[Configuration]) -> Tensor:
        """One-hot options (n, all options)."""
        parts = zip(zip(*configurations, strict=True), self.genes, strict=True)
        rows = [torch.eye(len(options), dtype=torch.float64)[list(taken)] for taken, options in parts]
        return torch.cat(rows, 1)

    def measure(self, configurations: Iterable[Configuration]) -> None:
        """Measure those that were not yet.

        Raises:
            WeftError: predictions that are not finite.
        """
        new = [c for c in dict.fromkeys(configurations) if c not in self.measured]
        cuts = [{name: choice.size for name, choice in self.choices(c).items()} for c in new]
        for one, value in zip(new, self.divergence(cuts) if cuts else [], strict=True):
            if not 0 <= value < float("inf"):
                raise WeftError("The model's predictions are not finite when it is cut; load it in a wider dtype.")
            self.measured[one] = float(value)

    def best(self, budget: int) -> Choices:
        """Of what was measured and fits, what moved the predictions least; of equals, the fewer bytes."""
        fitting = [c for c in self.measured if self.nbytes(c) <= budget]
        return self.choices(min(fitting, key=lambda c: (self.measured[c], self.nbytes(c))))


def draw(trials: Trials, budget: int, generator: torch.Generator) -> Configuration:
    """A random configuration that spends the budget: from the largest options on, one gene after another is lowered."""
    taken = [len(options) - 1 for options in trials.genes]
    while trials.nbytes(tuple(taken)) > budget:
        free = [gene for gene, option in enumerate(taken) if option]
        taken[free[int(torch.randint(len(free), (), generator=generator))]] -= 1
    return tuple(taken)
