"""minitron: neurons, heads, channels and blocks that a few texts move least are cut out of the whole model alike, and
the dense model teaches what is left (Muralidharan et al., 2024, arXiv 2407.14679; Sreenivas et al., 2024, 2408.11796).

    per sequence the mean over its tokens, over sequences the root of the sum of squares, of

    neuron j     |z_j|, z = act(gate) up
    head h       ||a_h||, a_h what the queries of one key-value head put before o
    channel k    |norm(x)_k|, summed over all norms of the network
    block l      1 - E[cos(x_l, x_l+1)], or how much the loss rises without it (`by` influence or loss)

    weft compress MODEL -o OUT --method minitron --budget 0.7
    weft finetune OUT -o REC --method full --teacher MODEL --data FILE
    weft finetune OUT -o REC --method full --teacher MODEL --teacher-features 1 --data FILE      where much depth went

The result is a plain model of the same class with a configuration of its own: nothing of weft is needed to open it.
The budget counts the whole model's numbers, for embeddings and head are cut too. Every axis of `axes` (neurons,
channels, heads, blocks) keeps the same share, the largest that fits, in multiples of `multiple` for neurons (64 in the
paper), and for channels of the next number that the queries divide, as configurations want it. Importance is taken
once: the paper finds that taking it again after each cut does not help. Norms of fewer channels have other means, so
that the loss jumps before training: train, then judge.
Deviations: shapes are those of one share, where the paper trains some around the target and keeps the best: give other
`axes` and compare. Heads are cut with their key-value head, and what they held is not folded into those that stay. The
teacher's logits are learned, as the paper has it for width; its loss of hidden states for much depth has one fixed
weight, and needs all channels (`weft.rules.features`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError, unknown
from weft.methods.base import Method
from weft.stats.cache import accumulate, fingerprint
from weft.stats.calibrate import Batch, forward_inputs, frozen, mean_loss, to_device
from weft.stats.influence import block_influence
from weft.stats.streams import Streams
from weft.terms.units import AXES, Kept, blocks_of, counts_of, cut, numbers

__all__ = ["METHOD", "Importance", "fitting", "importance", "kept", "shrink"]


@dataclass(frozen=True)
class Importance:
    """What each unit is worth: neurons (f,) and heads (h,) by block, channels (d,), blocks (b,)."""

    neurons: Sequence[Tensor]
    heads: Sequence[Tensor]
    channels: Tensor
    blocks: Tensor


def shrink(
    model: Any,
    batches: Sequence[Batch],
    most: int,
    cache: Path | None = None,
    *,
    axes: str = "neurons,channels",
    multiple: int = 16,
    by: str,
) -> tuple[Any, Kept]:
    """The smaller model of at most so many numbers, and which units of the given one it has.

    `cache` is a directory, from which an interrupted call goes on.

    Raises:
        WeftError: an axis or a measure of blocks that there is not, a multiple below 1, or too few numbers.
    """
    if by not in ("influence", "loss"):
        raise unknown("measure of blocks", by, ("influence", "loss"))
    counts = fitting(model, most, tuple(axis.strip() for axis in axes.split(",")), multiple)
    found = importance(model, batches, cache=cache)
    if counts["blocks"] < len(found.blocks) and by == "loss":
        found = replace(found, blocks=_losses_without(model, batches, cache))
    chosen = kept(found, counts)
    return cut(model, chosen), chosen


def fitting(model: Any, most: int, axes: Sequence[str], multiple: int) -> dict[str, int]:
    """How many units of each sort stay: of `axes` the largest common share that makes at most so many numbers."""
    strange = next((axis for axis in axes if axis not in AXES), None)
    if strange is not None:
        raise unknown("axis", strange, AXES)
    if multiple < 1:
        raise WeftError(f"The multiple is {multiple}: neurons and channels are multiples of a whole number from 1 on.")
    whole = counts_of(model)
    queries = model.config.num_attention_heads // whole["heads"]

    def at(share: float) -> dict[str, int]:
        counts = dict(whole)
        for axis in (axis for axis in ("blocks", "heads", "neurons", "channels") if axis in axes):
            # configurations ask for channels that the queries divide
            unit = 1 if axis in ("blocks", "heads") else multiple
            unit = unit if axis != "channels" else -(-unit // (q := counts["heads"] * queries)) * q
            counts[axis] = min(max(int(share * whole[axis] / unit + 1e-9), 1) * unit, whole[axis])
        return counts

    shapes = [at(share) for share in sorted({n / whole[axis] for axis in axes for n in range(1, whole[axis] + 1)})]
    low, high = 0, len(shapes)
    while low < high:  # the first shape that has too many
        middle = (low + high) // 2
        low, high = (middle + 1, high) if numbers(model, shapes[middle]) <= most else (low, middle)
    if not low:
        raise WeftError(
            f"The budget is {most:,} numbers, and the smallest model by {', '.join(axes)} has "
            f"{numbers(model, shapes[0]):,}; give at least that, a smaller multiple, or more axes of {', '.join(AXES)}."
        )
    return shapes[low - 1]


def kept(found: Importance, counts: dict[str, int]) -> Kept:
    """Of each sort the units that are worth most; of equals, the first."""

    def best(worth: Tensor, axis: str) -> Tensor:
        order = worth.sort(descending=True, stable=True).indices
        return order[: counts[axis]].sort().values

    own = {axis: [best(worth, axis) for worth in getattr(found, axis)] for axis in ("heads", "neurons")}
    return Kept(best(found.blocks, "blocks"), best(found.channels, "channels"), own["heads"], own["neurons"])


@torch.no_grad()
def importance(model: Any, batches: Sequence[Batch], *, cache: Path | None = None) -> Importance:
    """What each unit is worth on these texts; blocks by their influence. An interrupted call goes on from its cache.

    Raises:
        WeftError: it is no number somewhere.
    """
    streams, sums = Streams(), dict[str, Tensor]()

    def add(key: str, x: Tensor, groups: int | None = None) -> None:
        size = x.abs() if groups is None else x.unflatten(-1, (groups, -1)).norm(dim=-1)  # type: ignore[no-untyped-call]
        sums[key] = sums.get(key, 0) + _squared_means(size, streams.now.keep(x)).cpu()

    def see(batch: Batch) -> None:
        streams.begin(to_device(batch, model))
        model(**forward_inputs(model, to_device(batch, model)))

    heads, blocks, norms = counts_of(model)["heads"], blocks_of(model), dict(_norms(model))
    with ExitStack() as stack:
        for enter in (frozen(model), streams.following(model)):
            stack.enter_context(enter)
        for block in blocks:
            down, o = (model.get_submodule(f"{block}.{name}") for name in ("mlp.down_proj", "self_attn.o_proj"))
            stack.callback(down.register_forward_pre_hook(_before(add, f"neurons:{block}")).remove)
            stack.callback(o.register_forward_pre_hook(_before(add, f"heads:{block}", heads)).remove)
        for name, norm in norms.items():
            stack.callback(norm.register_forward_hook(_after(add, f"channels:{name}")).remove)
        accumulate(batches, see, sums, _stem(model, batches, cache, "importance"))
    roots = {key: total.sqrt() for key, total in sums.items()}
    bad = next((key for key, root in roots.items() if not torch.isfinite(root).all()), None)
    if bad is not None:
        raise WeftError(
            f"What {bad.partition(':')[2]} sees holds NaN or infinity; load the model in float32, or repair it."
        )
    own = [[roots[f"{axis}:{block}"] for block in blocks] for axis in ("neurons", "heads")]
    channels = torch.stack([roots[key] for key in map("channels:{}".format, norms) if key in roots]).sum(0)
    influence = block_influence(model, batches, cache=cache)
    return Importance(own[0], own[1], channels, torch.tensor([influence[block] for block in blocks]))


def _stem(model: Any, batches: Sequence[Batch], cache: Path | None, what: str) -> Path | None:
    """Where sums of this model and text are kept."""
    return None if cache is None else cache / f"{what}-{fingerprint(model, batches, (), blocks_of(model))}"


def _before(add: Callable[..., None], key: str, groups: int | None = None) -> Any:
    return lambda module, args: add(key, args[0], groups)


def _after(add: Callable[..., None], key: str) -> Any:
    return lambda module, args, output: add(key, output)


def _squared_means(size: Tensor, keep: Tensor | None) -> Tensor:
    """size (sequences, tokens, n) -> (n,): the sum over sequences of the squared mean over the tokens that count."""
    weights = torch.ones(size.shape[:2], device=size.device) if keep is None else keep
    weights = weights.double() / weights.sum(1, keepdim=True).clamp(min=1)
    return (size.double() * weights.unsqueeze(-1)).sum(1).square().sum(0)


def _norms(model: Any) -> list[tuple[str, nn.Module]]:
    """Those of the residual stream, by name."""
    width = counts_of(model)["channels"]
    return [
        (name, module)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and [tuple(p.shape) for n, p in module.named_parameters(recurse=False) if n == "weight"] == [(width,)]
        and not name.rpartition(".")[2].startswith(("q_", "k_"))
    ]


@torch.no_grad()
def _losses_without(model: Any, batches: Sequence[Batch], cache: Path | None) -> Tensor:
    """The mean loss without each block (b,)."""
    losses = dict[str, Tensor]()

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def without(block: str) -> None:
        handle = model.get_submodule(block).register_forward_hook(skip, with_kwargs=True)
        try:
            with frozen(model):
                losses[block] = torch.tensor(mean_loss(model, batches), dtype=torch.float64)
        finally:
            handle.remove()

    accumulate(blocks_of(model), without, losses, _stem(model, batches, cache, "without"))
    return torch.stack([losses[block] for block in blocks_of(model)]).float()


METHOD = Method(
    name="minitron",
    kind="prune",
    summary="A smaller plain model: the neurons, channels, heads or blocks that a few texts move least are cut.",
    paper="Muralidharan et al., 2024, arXiv 2407.14679; Sreenivas et al., 2024, arXiv 2408.11796",
    shrink=shrink,
    defaults={"axes": "neurons,channels", "multiple": 16, "by": "influence"},
)
