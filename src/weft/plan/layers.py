"""What a step holds of a model of many equal blocks, counted on a few of them.

The forward pass enters block after block, each of which leaves its activations, a. The backward pass leaves them again
in the opposite order, each changing what is held by c, as its gradients come and its activations go. Between two
borders the most that is held is counted by itself. With n further blocks like the last, of weights w, it grows by

    n w                              before the last block
    n w + n a                        within the last, and up to its gradient
    n w + max(n a, n (a + c))        within the last, backwards
    n w + n (a + c)                  in all blocks before it, and afterwards

which is no estimate: it is what the whole model would have given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from weft.plan.work import Work, Working
from weft.terms.layers import block_stacks

__all__ = ["BLOCKS", "Borders", "Held", "Passes", "Stepped", "blocks_of", "equal", "few", "held", "stepped"]

BLOCKS = {"training": 2, "forward": 2, "inference": 3}
"""Of the model that is counted, the last of which stands for all others: a pass that leaves nothing frees what the
block before the last one gave, which only a third shows.
"""
_CALLS = 10_000
"""Of a step that is made in full rather than said by two blocks."""
Passes = Literal["training", "forward", "inference"]


@dataclass(frozen=True)
class Held:
    """Bytes of a forward and a backward pass, or of a forward pass alone."""

    weights: int
    activations: int  # what the forward pass leaves
    gradients: int  # of a training step; of other passes, what is still there at their end
    peaks: tuple[int, ...]  # the most between every two borders, weights included
    work: Work = field(default_factory=Work)

    @property
    def peak(self) -> int:
        """The most at all."""
        return max(self.peaks)


@dataclass(frozen=True)
class Stepped:
    """Bytes of an optimizer."""

    state: int
    workspace: int  # of a step beside weights, gradients and state
    work: Work = field(default_factory=Work)


class Border(NamedTuple):
    """What is known where a pass crosses it."""

    alive: int
    most: int  # since the border before
    work: Work  # until here


class Borders:
    """What was alive, and at most since the border before, at every border that a pass crosses."""

    def __init__(self, live: Working, blocks: nn.ModuleList) -> None:
        self.live, self.blocks = live, blocks
        self.found: dict[str, Border] = {}
        self.forward = True

    def cross(self, border: str) -> None:
        """The pass is there now."""
        self.found.setdefault(border, Border(self.live.now, self.live.peak, self.live.work))
        self.live.peak = self.live.now

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, the passes of the model are followed."""
        hooks = [
            block.register_forward_pre_hook(self._enter(i), with_kwargs=True) for i, block in enumerate(self.blocks)
        ]
        hooks += [block.register_forward_hook(self._exit(i)) for i, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, i: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.forward:  # and not when checkpointing runs it again
                self.cross(f"enter {i}")

        return enter

    def _exit(self, i: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not self.forward:
                return
            self.cross(f"exit {i}")
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.cross(f"back {i}"))  # type: ignore[no-untyped-call]

        return leave

    def crossed(self, borders: tuple[str, ...]) -> bool:
        """Whether the pass went over all of these, in this order."""
        return tuple(name for name in self.found if name in borders) == borders


def blocks_of(model: nn.Module) -> nn.ModuleList | None:
    """The one stack of blocks of a model; None where it has none or several."""
    stacks = block_stacks(model)
    return next(iter(stacks.values())) if len(stacks) == 1 else None


def equal(model: nn.Module) -> bool:
    """Whether the blocks of a model are of the same shapes, and share no tensor."""
    blocks = [_tensors(block) for block in blocks_of(model) or ()]
    shapes = {tuple((name, tuple(t.shape), t.dtype) for name, t in block.items()) for block in blocks}
    return len(shapes) == 1 and len({id(t) for block in blocks for t in block.values()}) == sum(map(len, blocks))


def few(model: nn.Module) -> int | None:
    """Leave a model the blocks that stand for all in training; how many there were, None where it stays as it is."""
    blocks = blocks_of(model)
    if blocks is None or len(blocks) <= BLOCKS["training"] or not equal(model):
        return None
    whole = len(blocks)
    del blocks[BLOCKS["training"] :]
    return whole


def held(
    model: nn.Module, inputs: Mapping[str, Any], layers: int | None = None, passes: Passes = "training"
) -> Held | None:
    """What the passes over `inputs` hold; with `layers`, of a model of so many blocks where `model` has `BLOCKS`.

    None where the blocks are not crossed one after another, so that nothing can be said of more of them.

    Args:
        passes: "training" is a forward and a backward pass; "forward" the former alone, with what it leaves for the
            latter; "inference" one that leaves nothing but its output, cache included.
    """
    blocks = blocks_of(model)
    with Working() as live, torch.set_grad_enabled(passes != "inference"):
        weights = live.count([*model.parameters(), *model.buffers()])
        live.count(tensor for tensor in inputs.values() if isinstance(tensor, Tensor))
        borders = Borders(live, nn.ModuleList() if blocks is None else blocks)
        borders.cross("start")
        with borders.watched():
            output = model(**inputs)
            after = live.now
            borders.forward = False
            if passes == "training":
                loss = output.loss
                del output
                loss.backward()
                del loss
        borders.cross("end")
    start, end = borders.found["start"].alive, borders.found["end"].alive
    model.zero_grad()
    peaks = tuple(border.most for border in borders.found.values())
    whole = Held(weights, after - start, max(end - start, 0), peaks, live.work)
    return whole if layers is None else _stretched(whole, borders, layers, passes == "training")


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict([*block.named_parameters(), *block.named_buffers()])


def _stretched(whole: Held, borders: Borders, layers: int, backward: bool) -> Held | None:
    found, last = borders.found, len(borders.blocks) - 1
    forward = [f"{way} {i}" for i in range(last + 1) for way in ("enter", "exit")]
    back = [f"back {i}" for i in range(last, -1, -1)] if backward else []
    if last < 1 or [name for name in found if name != "back -1"] != ["start", *forward, *back, "end"]:
        return None
    more = layers - last - 1
    weight = sum(t.nbytes for t in [*borders.blocks[last].parameters(), *borders.blocks[last].buffers()])
    way = [(f"exit {last - 1}", f"exit {last}"), *([(f"back {last}", f"back {last - 1}")] if backward else [])]
    kept, *freed = (found[end].alive - found[start].alive for start, end in way)
    left = kept + sum(freed)
    work = whole.work
    for start, end in way:
        work = work.plus(found[end].work, more).plus(found[start].work, -more)
    moved = dict.fromkeys(["start", *forward], 0) | {f"exit {last}": max(more * kept, 0), f"back {last}": more * kept}
    moved |= {f"back {last - 1}": more * max(kept, left)}
    peaks = (border.most + moved.get(name, more * left) + more * weight for name, border in found.items())
    return Held(
        whole.weights + more * weight,
        whole.activations + more * kept,
        whole.gradients + more * left,
        tuple(peaks),
        work,
    )


def stepped(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], layers: int | None = None) -> Stepped:
    """What the optimizer of a model holds; with `layers`, of so many blocks where `model` has `BLOCKS`.

    Of an optimizer that takes several matrices at a time, all blocks are stepped unless these are too many calls, as
    they are where matrices are so large that it takes them one by one, too.
    """
    most = _step(model, make)
    blocks = blocks_of(model)
    if layers is None or blocks is None:
        return most
    last, count = blocks[-1], len(blocks)
    del blocks[-1]
    try:
        fewer = _step(model, make)
    finally:
        blocks.append(last)
    more = layers - count
    work = most.work.plus(most.work, more).plus(fewer.work, -more)
    if getattr(make(model), "in_batches", False) and work.calls <= _CALLS:
        blocks.extend(_another(last) for _ in range(more))
        whole = _step(model, make)
        del blocks[count:]
        return whole
    workspace = most.workspace + more * (most.workspace - fewer.workspace)
    return Stepped(most.state + more * (most.state - fewer.state), workspace, work)


def _another(block: nn.Module) -> nn.Module:
    """A copy with tensors of its own, of no values."""
    known: dict[int, Any] = {}
    for tensor in [*block.parameters(), *block.buffers()]:
        own = torch.empty_like(tensor)
        known[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
        if isinstance(tensor, FakeTensor):
            known[id(tensor.fake_mode)] = tensor.fake_mode
    return copy.deepcopy(block, known)


def _step(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Stepped:
    """The second step of an optimizer: what it keeps, and needs besides."""
    with Working() as live:
        live.count(model.parameters())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        before = live.now
        optimizer = make(model)
        optimizer.step()
        after, live.peak, first = live.now, live.now, live.work
        optimizer.step()
        peak = live.peak
    model.zero_grad()
    return Stepped(after - before, peak - after, live.work.plus(first, -1))
