"""The sequential form: block by block, each group of layers seeing the outputs of everything changed before it.

    for group in walk(model, batches, layers):
        ... replace group.names in the model, from group.moments ...

Only the hidden states between two blocks and one group's moments are in memory. Beside the inputs x of the changed
model, the walk can follow the inputs x_o that the same layers had in the original one (`original=True`), for
E[x_o x^T]: what is needed to correct for the drift between the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.stats.calibrate import Batch, forward_inputs, forward_masks, frozen, to_device
from weft.stats.collect import Collector, kept_rows
from weft.terms.layers import block_stacks, linear_layers

__all__ = ["Group", "walk"]


@dataclass(frozen=True)
class Group:
    """Layers of one block that are fed one tensor, with the statistics of it in the model as it is now."""

    block: str  # the block's name, "" for layers outside every block
    names: list[str]
    moments: dict[
        str, Tensor
    ]  # of the input, shared by all names; with `original`, also "cross_moment" E[x_o x^T] (in, in)


@dataclass
class _Call:
    """What a block is called with, for one batch: everything but the hidden states, which the walk carries itself."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    masks: list[Tensor] = field(default_factory=list)


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
                    yield from _walk_block(name, block, before, calls[i], reference and reference[i], mine, needs)
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
    for group in _groups(block, calls[0], list(inner)):
        leader = group[0]
        moments = _input_moments(block, before, calls, reference, leader, needs)
        yield Group(name, [inner[member] for member in group], moments)


def _input_moments(
    block: nn.Module,
    before: nn.Module | None,
    calls: list[_Call],
    reference: list[_Call] | None,
    leader: str,
    needs: Sequence[str],
) -> dict[str, Tensor]:
    collector = Collector({leader: block.get_submodule(leader)}, needs)
    cross: Tensor | None = None
    count = 0
    for i, call in enumerate(calls):
        collector.masks = call.masks
        with collector:
            x = _input_of(block, call, leader)
        if before is not None and reference is not None:
            x_o = kept_rows(_input_of(before, reference[i], leader), call.masks)
            product = x_o.mT @ kept_rows(x, call.masks)
            cross = product.double() if cross is None else cross + product
            count += len(x_o)
    moments = collector.moments()[leader]
    return moments if cross is None else {**moments, "cross_moment": cross / count}


def _input_of(block: nn.Module, call: _Call, layer: str) -> Tensor:
    """The input of one layer when the block runs; the pass ends there."""
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
    return seen[0]


def _groups(block: nn.Module, call: _Call, layers: list[str]) -> list[list[str]]:
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
    groups: list[list[str]] = []
    previous: Tensor | None = None
    for layer, x in order:
        if any(layer in group for group in groups):
            continue
        if groups and x is previous:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        previous = x
    return groups


def _block_calls(model: nn.Module, path: str, batches: Sequence[Batch]) -> list[list[_Call]]:
    """What each block of a stack is called with: [block][batch]. Hidden states are kept for the first block only."""
    stack = model.get_submodule(path)
    calls: list[list[_Call]] = [[] for _ in stack]  # type: ignore[union-attr, attr-defined]

    def record(i: int, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = _positional_hidden(args, kwargs)
            calls[i].append(_Call(args[0] if i == 0 else args[0].new_empty(0), args[1:], kwargs))
            if last:
                raise _Stop

        return hook

    blocks = list(stack)  # type: ignore[arg-type]
    handles = [
        block.register_forward_pre_hook(record(i, i == len(blocks) - 1), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        for batch in batches:
            batch = to_device(batch, model)
            with suppress(_Stop):
                model(**forward_inputs(model, batch))
            for block_calls in calls:
                block_calls[-1].masks = forward_masks(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _positional_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the hidden states first, and without a key-value cache, which a repeated call would fill again."""
    kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_value", "past_key_values", "use_cache")}
    if not args:
        args = (kwargs.pop("hidden_states"),)
    return args, kwargs


def _advance(block: nn.Module, calls: list[list[_Call]], i: int) -> None:
    """Run block i on every batch and hand its outputs to block i + 1; the hidden states before it are freed."""
    for b, call in enumerate(calls[i]):
        if i + 1 < len(calls):
            output = block(call.hidden, *call.args, **call.kwargs)
            calls[i + 1][b].hidden = output[0] if isinstance(output, tuple) else output
        call.hidden = call.hidden.new_empty(0)


def _outside_blocks(
    model: nn.Module, batches: Sequence[Batch], layers: list[str], needs: Sequence[str]
) -> Iterator[Group]:
    """Layers in no block (a pooler, a projection before the first block): one whole pass each, in the model's order."""
    found = linear_layers(model)
    for layer in layers:
        collector = Collector({layer: found[layer]}, needs)
        with collector:
            for batch in batches:
                batch = to_device(batch, model)
                collector.masks = forward_masks(batch)
                model(**forward_inputs(model, batch))
        yield Group("", [layer], collector.moments()[layer])
