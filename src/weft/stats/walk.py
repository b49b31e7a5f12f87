"""The sequential form: block by block, each group of layers seeing the outputs of everything changed before it.

    for group in walk(model, batches, layers):
        ... replace group.names in the model, from group.moments ...

Only the hidden states between two blocks and one group's moments are in memory. Beside the inputs x of the changed
model, the walk can follow the inputs x_o that the same layers had in the original one (`original=True`), for
E[x_o x^T]: what is needed to correct for the drift between the two.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from weft.errors import WeftError
from weft.stats.calibrate import Batch, forward_inputs, frozen, to_device
from weft.stats.collect import Collector, kept_rows
from weft.stats.streams import Stream, Streams
from weft.terms.experts import expert_layers
from weft.terms.layers import block_stacks, eligible

__all__ = ["Group", "walk"]


@dataclass(frozen=True)
class Group:
    """Layers of one block that are fed one tensor, with the statistics of it in the model as it is now."""

    block: str  # the block's name, "" for layers outside every block
    names: list[str]
    moments: dict[str, Tensor]  # of their input; with `original`, also "cross_moment" E[x_o x^T] (in, in), but for
    # experts, to which the two models route different tokens


@dataclass
class _Call:
    """What a block is called with, for one batch: everything but the hidden states, which the walk carries itself."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Stream


class _Stop(Exception):
    """Raised by a hook to end a forward pass that has shown what it was run for."""


@torch.no_grad()
def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[str],
    needs: Sequence[str] = ("input_moment",),
    *,
    original: bool = False,
    done: Callable[[str], bool] = lambda block: False,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
) -> Iterator[Group]:
    """Groups of layers in the order in which the model applies them; the caller changes the model between two of them.

    Args:
        layers: names of linear layers, as `weft.terms.layers.linear_layers` gives them.
        needs: input statistics (`weft.stats.collect.INPUT_NEEDS`).
        original: follow the original model too, for `cross_moment`. One block is held twice.
        done: tells a block that was changed before an interruption: the walk passes through it without collecting.
        track: (blocks, description) -> the same blocks, for a progress bar.
    """
    remaining = set(layers)
    stacks = block_stacks(model)
    with frozen(model):
        # a decoder's original calls hold the original encoder's outputs: record them before anything changes
        originals = {path: _block_calls(model, path, batches) for path in stacks} if original else {}
        for path, stack in stacks.items():
            calls, reference = _block_calls(model, path, batches), originals.pop(path, None)
            for i, block in enumerate(track(stack, "walking")):
                name = f"{path}.{i}"
                mine = [layer for layer in layers if layer.startswith(name + ".")]
                before = copy.deepcopy(block) if reference else None
                if mine and not done(name):
                    yield from _walk_block(
                        name, block, before, calls[i], reference[i] if reference else None, mine, needs
                    )
                remaining -= set(mine)
                _advance(block, calls, i)
                if reference and before is not None:
                    _advance(before, reference, i)
        outside = [layer for layer in layers if layer in remaining]
        if outside and not done(""):
            yield from _outside_blocks(model, batches, outside, needs)


def _walk_block(
    name: str,
    block: nn.Module,
    before: nn.Module | None,
    calls: list[_Call],
    reference: list[_Call] | None,
    layers: list[str],
    needs: Sequence[str],
) -> Iterator[Group]:
    inner = {layer.removeprefix(name + "."): layer for layer in layers}
    for group in _groups(name, block, calls[0], list(inner)):
        expert = bool(expert_layers(block, group))
        twin = None if expert else before
        moments = _input_moments(block, twin, calls, reference, group[0], inner[group[0]], needs, expert)
        if moments is None:
            warnings.warn(f"No token reaches {inner[group[0]]} any more: it stays as it is.", stacklevel=2)
            continue
        yield Group(name, [inner[member] for member in group], moments)
        del moments  # before those of the next group are made


def _input_moments(
    block: nn.Module,
    before: nn.Module | None,
    calls: list[_Call],
    reference: list[_Call] | None,
    leader: str,
    full_name: str,
    needs: Sequence[str],
    optional: bool,
) -> dict[str, Tensor] | None:
    """Those of a layer; None for one that is optional and sees nothing."""
    collector = Collector({full_name: block.get_submodule(leader)}, needs, [full_name] if optional else ())
    cross: Tensor | None = None
    count = 0
    for i, call in enumerate(calls):
        collector.streams.now = call.stream
        with collector:
            x = _input_of(block, call, leader)
        if before is not None and reference is not None and x is not None:
            x_o = _input_of(before, reference[i], leader)
            assert x_o is not None
            x_o = kept_rows(x_o, reference[i].stream)
            product = x_o.mT @ kept_rows(x, call.stream)
            cross = product.double() if cross is None else cross + product
            count += len(x_o)
    moments = collector.moments().get(full_name)
    return moments if cross is None or moments is None else {**moments, "cross_moment": cross / count}


def _input_of(block: nn.Module, call: _Call, layer: str) -> Tensor | None:
    """The input of one layer when the block runs; the pass ends there. None where it is not called."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(args[0])
        raise _Stop

    handle = block.get_submodule(layer).register_forward_hook(hook)
    try:
        block(call.hidden, *call.args, **call.kwargs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else None


def _groups(name: str, block: nn.Module, call: _Call, layers: list[str]) -> list[list[str]]:
    """The block's layers in the order of their calls, those fed the very same tensor together."""
    order: list[tuple[str, Tensor]] = []
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(
            lambda m, args, layer=layer: order.append((layer, args[0]))
        )
        for layer in layers
    ]
    try:
        block(call.hidden, *call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    called, experts = Counter(layer for layer, _ in order), expert_layers(block, layers)
    for layer in layers:
        if called[layer] != 1 and layer not in experts:
            raise WeftError(
                f"The block {name} applies its layer {layer} {called[layer]} times in a pass: compress without the "
                "sequential form, or leave the layer out with a layer pattern."
            )
    groups: list[list[str]] = []
    previous: Tensor | None = None
    for layer, x in order:
        if x is previous:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        previous = x
    return groups + [[layer] for layer in layers if layer in experts and not called[layer]]  # by later batches


def _block_calls(model: nn.Module, path: str, batches: Sequence[Batch]) -> list[list[_Call]]:
    """What each block of a stack is called with: [block][batch]. Hidden states are kept for the first block only."""
    blocks: list[nn.Module] = list(model.get_submodule(path))  # type: ignore[call-overload]
    recorder = _Recorder(path, [[] for _ in blocks])
    handles = [handle for i, block in enumerate(blocks) for handle in recorder.watch(i, block)]
    try:
        with recorder.streams.following(model):
            for batch in batches:
                batch = to_device(batch, model)
                recorder.begin(batch)
                with suppress(_Stop):
                    model(**forward_inputs(model, batch))
                recorder.check()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.calls


@dataclass
class _Recorder:
    """Hooks that note what each block is called with; the first batch runs through, to see whether they are a chain."""

    path: str
    calls: list[list[_Call]]
    streams: Streams = field(default_factory=Streams)
    order: list[int] = field(default_factory=list)  # of the blocks in this pass
    output: Tensor | None = None  # of the block before
    chained: bool = True

    def begin(self, batch: Batch) -> None:
        """A pass over this batch comes next."""
        self.streams.begin(batch)
        self.order, self.output = [], None

    def watch(self, i: int, block: nn.Module) -> Iterator[Any]:
        """The hooks of block i."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = _positional_hidden(args, kwargs)
            self.order.append(i)
            if self.output is not None:
                self.chained &= torch.equal(args[0], self.output)
            hidden = args[0] if i == 0 else args[0].new_empty(0)
            self.calls[i].append(_Call(hidden, args[1:], kwargs, self.streams.now))
            if i + 1 == len(self.calls) and len(self.calls[i]) > 1:
                raise _Stop

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.output = _hidden(output) if len(self.calls[0]) == 1 and i + 1 < len(self.calls) else None

        yield block.register_forward_pre_hook(before, with_kwargs=True)
        yield block.register_forward_hook(after)

    def check(self) -> None:
        """Raises WeftError for blocks that are not applied once each, in order, one to the output of another."""
        if self.order != list(range(len(self.calls))) or not self.chained:
            raise WeftError(
                f"The blocks of {self.path} are no chain, each applied once to what the one before it gives: compress "
                "without the sequential form."
            )


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _positional_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the hidden states first, and without a key-value cache, which a repeated call would fill again."""
    kwargs = {k: v for k, v in kwargs.items() if k != "use_cache" and not isinstance(v, Cache)}
    if not args:
        args = (kwargs.pop("hidden_states"),)
    return args, kwargs


def _advance(block: nn.Module, calls: list[list[_Call]], i: int) -> None:
    """Run block i on every batch and hand its outputs to block i + 1; the hidden states before it are freed."""
    for b, call in enumerate(calls[i]):
        if i + 1 < len(calls):
            calls[i + 1][b].hidden = _hidden(block(call.hidden, *call.args, **call.kwargs))
        call.hidden = call.hidden.new_empty(0)


def _outside_blocks(
    model: nn.Module, batches: Sequence[Batch], layers: list[str], needs: Sequence[str]
) -> Iterator[Group]:
    """Layers in no block (a pooler, a projection before the first block): one whole pass each, in the model's order."""
    found = eligible(model)
    for layer in layers:
        collector = Collector({layer: found[layer]}, needs)
        with collector, collector.streams.following(model):
            for batch in batches:
                batch = to_device(batch, model)
                collector.begin(batch)
                model(**forward_inputs(model, batch))
        yield Group("", [layer], collector.moments()[layer])
