"""What `compress` would hold, by every method: its own code, on tensors without values and a few blocks.

    calibration   M + k s + A     statistics s of each of k blocks, and what a pass over a batch needs beside them
    survey        M + k s + W     factors or codes of one layer after another
    replacement   M + R           terms take the places of weights; or a walk splits anew, block by block

M are the model's weights. A, W and R grow by the same bytes with every further block, as two and three of them say:
activations that wait for a backward pass, and finished pieces, unless they lie on a disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.errors import WeftError
from weft.memory.live import Live
from weft.methods.base import Method
from weft.plan import Supposed, unmasked
from weft.records import find
from weft.runs.pieces import Piece, Store
from weft.stats.calibrate import Batch, calibrate, first_block
from weft.terms.layers import linear_layers
from weft.verbs.compress import compress, plan_of
from weft.verbs.moments import BlockMoments
from weft.verbs.sources import Source
from weft.verbs.survey import offered

__all__ = ["Compressing", "Phases", "phases"]

_FEW = 2
"""Blocks of the smaller model that stands for all; another has one more."""
_BATCHES, _ROWS = 8, 4
"""Of calibration, as `weft compress` cuts them."""


class Phases(NamedTuple):
    """Bytes; the most of each part of the work without the statistics that are there."""

    weights: int
    statistics: int  # of all blocks
    calibration: int
    survey: int
    replacement: int
    written: int  # to a disk meanwhile
    output: int

    def plus(self, few: Phases, more: Phases, times: int) -> Phases:
        """With so many times what `more` has more than `few`."""
        return Phases(*(own + times * (there - here) for own, here, there in zip(self, few, more, strict=True)))


class _Block(NamedTuple):
    """Bytes of one block."""

    statistics: int
    piece: int  # of what the survey made, as far as it stays in memory
    activations: int  # for a backward pass


class _Kept(NamedTuple):
    """A tensor on a disk."""

    shape: torch.Size
    dtype: torch.dtype


class _Disk(Store):
    """Pieces on a disk: nothing of them is in memory until they are read again."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[str, tuple[dict[str, _Kept], dict[str, Any]]] = {}
        self.nbytes = 0

    def get(self, name: str) -> Piece | None:
        if name not in self.pieces:
            return None
        kept, words = self.pieces[name]
        return Piece({key: torch.empty(one.shape, dtype=one.dtype) for key, one in kept.items()}, words)

    def put(self, name: str, piece: Piece) -> None:
        self.pieces[name] = ({key: _Kept(t.shape, t.dtype) for key, t in piece.tensors.items()}, piece.words)
        self.nbytes += _bytes(piece.tensors.values())


class _Bounded(Live):  # type: ignore[no-untyped-call]
    """For methods that take columns one after another, which would take hours where nothing is computed."""

    left = 60_000

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise WeftError("it takes too many small steps to be planned; run it on a smaller model and look.")
        return super().__torch_dispatch__(func, types, args, kwargs)


def phases(model: nn.Module, method: Method, batches: Sequence[Batch], *, disk: bool) -> Phases:
    """What calibration and `compress` hold of a model, which is compressed afterwards.

    Args:
        disk: whether finished pieces lie on one.
    """
    needs, device = plan_of(method, method.allocate).needs, next(model.parameters()).device.type
    with _Bounded(device) as live:
        weights = live.count([*model.parameters(), *model.buffers()])
        stats = calibrate(model, batches[:2], needs) if needs else None
        statistics = _bytes(t for moments in (stats or {}).values() for t in moments.values())
        calibration, live.peak = live.peak, live.now
        store, survey = _Disk() if disk else Store(), 0

        def track(items: Iterable[Any], what: str) -> Iterator[Any]:
            nonlocal survey
            for item in items:
                yield item
                if what == "factorising":
                    survey, live.peak = max(survey, live.peak), live.now

        budget = _kept(model, method)
        with warnings.catch_warnings(action="ignore"):  # that tensors without values lie nowhere
            done = compress(model, method, budget=budget, batches=batches, stats=stats, progress=store, track=track)
        most = (calibration, survey or weights + statistics, live.peak)
    written = store.nbytes + statistics if isinstance(store, _Disk) else 0
    spare = done.allocation.allowed - done.allocation.spent  # of losses without values, the smallest sizes follow
    output = _bytes([*model.parameters(), *model.buffers()]) + spare
    calibrating, surveying, replacing = (peak - statistics for peak in most)
    return Phases(weights, statistics, calibrating, surveying, replacing, written, output)


def _groups(source: BlockMoments) -> Iterator[tuple[int, int]]:
    """The first block and the number of blocks of each group whose statistics are collected together."""
    first = 0
    while first < len(source.blocks):
        count = len(source.group(first))
        yield first, count
        first += count


def _kept(model: nn.Module, method: Method) -> str | None:
    """What is kept: the method's own share, or four bits of what comes in several widths."""
    sizes = next(iter(offered(model, plan_of(method, None, list(linear_layers(model)))).values())).sizes
    return "4.25 bits" if method.kind == "quantize" and len(sizes) > 1 else None


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of different storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass(frozen=True)
class Compressing:
    """What is the same for all methods of a plan.

    Args:
        dtype: of the weights that are loaded.
        window: tokens of a row of calibration.
    """

    source: Source
    dtype: torch.dtype
    device: torch.device
    window: int

    def row(self, name: str, memory: int) -> dict[str, Any]:
        """The parts of a method, and whether it fits in so many bytes."""
        method = find(name, "compress", "quantize")
        assert isinstance(method, Method)
        plan, blocks = plan_of(method, method.allocate, list(linear_layers(self.whole))), self.source.layers
        found, block = self._found(method, plan.on_disk(sum(p.nbytes for p in self.whole.parameters())))
        statistics, peak = 0, found.replacement
        source = BlockMoments(self.whole, plan.layers, plan.needs, [], None, None, Store(), plan.track)
        for first, count in _groups(source):
            there, later = count * block.statistics, max(blocks - first - count, 0)
            cut = first_block(self.whole, source.blocks[first]) is not None  # blocks before keep nothing for gradients
            before = first * (block.piece - (block.activations if cut else 0))
            statistics = max(statistics, there)
            peak = max(peak, found.calibration + before + there, found.survey - later * block.piece + there)
        fits, workspace = peak <= memory, peak - found.weights - statistics
        parts = {"weights": found.weights, "gradients": 0, "optimizer": 0, "activations": 0, "workspace": workspace}
        parts |= {"statistics": statistics, "disk": found.output + found.written, "least_bytes": peak}
        return {"name": name, "fits": fits, "peak_bytes": peak, **parts, "batch": _ROWS if fits else 0, "seconds": None}

    def _found(self, method: Method, disk: bool) -> tuple[Phases, _Block]:
        """What is held of all blocks, and of one."""
        blocks = self.source.layers
        if not self.source.equal or blocks <= _FEW + 1:
            found = self._run(method, blocks, _BATCHES if method.sequential else _FEW, disk)
            return found, _Block(found.statistics // max(blocks, 1), 0, 0)
        few, more = (self._run(method, n, _FEW, disk) for n in (_FEW, _FEW + 1))
        found = few.plus(few, more, blocks - _FEW)
        if method.sequential:  # whose walk keeps the hidden states of all batches
            found = found.plus(few, self._run(method, _FEW, _FEW + 1, disk), _BATCHES - _FEW)
        weight = more.weights - few.weights
        each = Phases(*(there - here for here, there in zip(few, more, strict=True)))
        return found, _Block(each.statistics, each.survey - weight, each.calibration - weight)

    @cached_property
    def whole(self) -> nn.Module:
        """All blocks in this dtype, on the meta device."""
        return self.source.empty(self.source.layers, self.dtype)

    def _run(self, method: Method, blocks: int, batches: int, disk: bool) -> Phases:
        model = self.source.empty(blocks, self.dtype)
        with FakeTensorMode(allow_non_fake_inputs=True), Supposed() as supposed, unmasked():
            model.to_empty(device=self.device)
            model.tie_weights()  # type: ignore[operator]
            rows = [{"input_ids": torch.zeros(_ROWS, self.window, dtype=torch.long)} for _ in range(batches)]
            found = phases(model.eval(), method, rows, disk=disk)
        if supposed.masked:
            raise WeftError("what it keeps of a matrix depends on values, of which a plan knows nothing.")
        return found
