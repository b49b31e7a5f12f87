"""Statistics of many layers in a bounded memory: of as many blocks at a time as may lie there together.

Each further group of blocks costs another pass over the batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from weft.stats.calibrate import Batch, Stats, calibrate, layers_by_block
from weft.terms.adapters import base_terms
from weft.terms.dense import sum_dense
from weft.terms.layers import shape_of

__all__ = ["SHARE", "Collected", "WithWeights", "groups_that_fit", "moment_bytes"]

SHARE = 1.0
"""Times the model's bytes that statistics may take at once, unless the caller says otherwise."""


class Collected(Mapping[str, dict[str, Tensor]]):
    """layer -> statistics, collected when they are asked for, with those of the other layers of its group.

    Args:
        model, batches, needs: as for `calibrate`.
        layers: names, best asked for in this order.

    Only one group is in memory: an earlier one that is asked for again is collected again.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], needs: Sequence[str], layers: Iterable[str]) -> None:
        self.model, self.batches, self.needs, self.layers = model, batches, tuple(needs), list(layers)
        limit = int(SHARE * sum(p.nbytes for p in model.parameters()))
        self.groups = groups_that_fit(model, self.layers, self.needs, limit)
        self._now: Stats = {}

    def __getitem__(self, layer: str) -> dict[str, Tensor]:
        if layer not in self._now:
            group = next((group for group in self.groups if layer in group), None)
            if group is None:
                raise KeyError(layer)
            self._now = {}  # before the next are made
            self._now = calibrate(self.model, self.batches, self.needs, layers=group)
        return self._now[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class WithWeights(Mapping[str, Mapping[str, Tensor]]):
    """layer -> its statistics and its "weight" (out, in) in fp32, each made when it is asked for."""

    def __init__(self, model: nn.Module, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.model, self.moments = model, moments

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        return _Known(self.model, layer, self.moments[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


class _Known(dict[str, Tensor]):
    def __init__(self, model: nn.Module, layer: str, moments: Mapping[str, Tensor]) -> None:
        super().__init__(moments)
        self.model, self.layer = model, layer

    def __missing__(self, name: str) -> Tensor:
        if name != "weight":
            raise KeyError(name)
        return sum_dense(base_terms(self.model, self.layer).values())


def groups_that_fit(model: nn.Module, layers: Iterable[str], needs: Sequence[str], limit: int) -> list[list[str]]:
    """The layers in runs of whole blocks whose statistics take at most `limit` bytes, or of one block."""
    groups: list[list[str]] = []
    left = 0
    for names in layers_by_block(model, layers):
        taken = moment_bytes(model, names, needs)
        if groups and taken <= left:
            groups[-1].extend(names)
        else:
            groups.append(list(names))
            left = limit
        left -= taken
    return groups


def moment_bytes(model: nn.Module, names: Iterable[str], needs: Sequence[str]) -> int:
    """Bytes that these layers' statistics take at most."""
    total = 0
    for name in names:
        out, inn = shape_of(model.get_submodule(name))
        squares = {"input_moment": inn * inn, "output_moment": out * out, "output_grad_moment": out * out}
        total += sum(4 * out * inn if need == "mean_grad" else 8 * squares.get(need, max(out, inn)) for need in needs)
    return total
