"""The statistics that a survey reads: of as many blocks at a time as may be in memory, with a pass for each group.

Of a chain of methods, the later ones find a model that is changed already, by codes of 2 bits beyond all recognition.
What they are predicted to lose is therefore in the unit of the model as it was, where the second-order form holds.
`keep_unit` collects it while that model is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from weft.allocate import NEEDS
from weft.runs.pieces import Store
from weft.stats.calibrate import Batch, Stats, calibrate, layers_by_block
from weft.stats.groups import SHARE, moment_bytes

__all__ = ["UNIT", "BlockMoments", "keep_unit", "kept_unit"]

UNIT = NEEDS["losses"]
"""The statistics in which losses are predicted."""

Track = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class BlockMoments:
    """The statistics of one block after another, collected for as many blocks at a time as may be in memory.

    Args:
        layers, needs: what is collected of which.
        given: statistics that the caller has already.
        by_block: one block at a time; None: as many as fit.
        store: whose directory holds what is collected, too.
    """

    model: nn.Module
    layers: Sequence[str]
    needs: Sequence[str]
    batches: Sequence[Batch]
    given: Stats | None
    by_block: bool | None
    store: Store
    track: Track
    now: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    last: int = -1

    def __post_init__(self) -> None:
        self.blocks = layers_by_block(self.model, self.layers)

    def of(self, block: int) -> Mapping[str, Mapping[str, Tensor]]:
        """Those of the layers of a block."""
        if self.given is not None or not self.needs:
            return self.given or {}
        if block > self.last:
            self.now = {}  # before the next are made
            group = self.group(block)
            self.last = block + len(group) - 1
            names = [name for names in group for name in names]
            self.now = calibrate(
                self.model, self.batches, self.needs, layers=names, cache=self.store.directory, track=self.track
            )
        return self.now

    def group(self, first: int) -> list[list[str]]:
        """The blocks from `first` on whose statistics may be in memory together, one at least."""
        if self.by_block is not None:
            return [self.blocks[first]] if self.by_block else self.blocks[first:]
        left = SHARE * sum(p.nbytes for p in self.model.parameters())
        group = [self.blocks[first]]
        left -= moment_bytes(self.model, self.blocks[first], self.needs)
        for names in self.blocks[first + 1 :]:
            left -= moment_bytes(self.model, names, self.needs)
            if left < 0:
                break
            group.append(names)
        return group


def keep_unit(source: BlockMoments, store: Store) -> None:
    """Keep the unit of the model as it is, block by block, unless it is there from before an interruption."""
    for i, names in enumerate(source.blocks):
        store.once(_name(i), partial(_unit, source, i, names))


def _unit(source: BlockMoments, block: int, names: Iterable[str]) -> dict[str, Tensor]:
    moments = source.of(block)
    return {f"{name}:{need}": moments[name][need].clone() for name in names for need in UNIT}


def kept_unit(store: Store, block: int, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """layer -> its unit, of the layers of a block."""
    piece = store.get(_name(block))
    assert piece is not None, "the unit is kept before a chain begins"
    return {name: {need: piece.tensors[f"{name}:{need}"] for need in UNIT} for name in names}


def _name(block: int) -> str:
    return f"unit-{block}"
