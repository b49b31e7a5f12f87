"""Units that a model of Llama's blocks is wide and deep by, and the smaller plain model that some of them make.

    blocks     whole blocks
    channels   numbers of the residual stream: of embeddings, norms, the head, and every layer's one side
    heads      one key-value head with its queries: rows of q, k and v, columns of o
    neurons    rows of gate and up, columns of down

All blocks are cut alike, so that what is left has a configuration of its own and needs nothing of weft to be opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.terms.layers import block_stacks, eligible, shape_of

__all__ = ["AXES", "LAYERS", "Kept", "blocks_of", "counts_of", "cut", "numbers"]

AXES = ("blocks", "channels", "heads", "neurons")

_SIDES = {
    **{f"self_attn.{name}_proj": ("heads", "channels") for name in "qkv"},
    "self_attn.o_proj": ("channels", "heads"),
    **{f"mlp.{name}_proj": ("neurons", "channels") for name in ("gate", "up")},
    "mlp.down_proj": ("channels", "neurons"),
}
"""Layer of a block -> the units along its rows, and along its columns."""

LAYERS = tuple(_SIDES)
"""The layers of a block, as in Llama, Mistral, Qwen and their kin."""


@dataclass(frozen=True)
class Kept:
    """The units that stay, ascending: blocks (b,), channels (d,), and heads (h,) and neurons (f,) of every block there
    was.
    """

    blocks: Tensor
    channels: Tensor
    heads: Sequence[Tensor]
    neurons: Sequence[Tensor]

    @property
    def counts(self) -> dict[str, int]:
        """How many of each."""
        own = (self.blocks, self.channels, self.heads[0], self.neurons[0])
        return {axis: len(kept) for axis, kept in zip(AXES, own, strict=True)}


def blocks_of(model: nn.Module) -> list[str]:
    """The names of all blocks, in order.

    Raises:
        WeftError: one lacks a layer of `LAYERS`.
    """
    names = [f"{path}.{i}" for path, stack in block_stacks(model).items() for i in range(len(stack))]
    there = eligible(model)
    for block in names:
        missing = next((name for name in LAYERS if f"{block}.{name}" not in there), None)
        if missing is not None:
            raise WeftError(
                f"{type(model).__name__} has no {missing} in {block}: only blocks of {', '.join(LAYERS)} can be pruned."
            )
    return names


def counts_of(model: Any) -> dict[str, int]:
    """How many units of each sort a model has.

    Raises:
        WeftError: its blocks are of other layers, or its layers hold no plain weights.
    """
    blocks = blocks_of(model)
    if not blocks or len(block_stacks(model)) != 1:
        raise WeftError(f"{type(model).__name__} has no single stack of blocks, so that nothing can be cut of it.")
    for name in (f"{block}.{layer}" for block in blocks for layer in LAYERS):
        if type(model.get_submodule(name)) is not nn.Linear:
            raise WeftError(f"The layer {name} holds no plain weight; give the model before it was compressed.")
    first = model.get_submodule(blocks[0])
    keys, _ = shape_of(first.get_submodule("self_attn.k_proj"))
    channels, neurons = shape_of(first.get_submodule("mlp.down_proj"))
    found = (len(blocks), channels, keys // first.get_submodule("self_attn").head_dim, neurons)
    return dict(zip(AXES, found, strict=True))


def numbers(model: Any, counts: Mapping[str, int]) -> int:
    """Parameters of the model with so many units of each sort; tied ones count once."""
    with torch.device("meta"):
        made = type(model)._from_config(_config(model, counts, range(counts["blocks"])))
    return sum(p.numel() for p in made.parameters())


def cut(model: Any, kept: Kept) -> Any:
    """A plain model of the same class with these units alone, in own memory; the given one is not touched.

    Raises:
        WeftError: a tensor whose sides follow other numbers than those of the units; channels of a model that scales
            its embeddings by their width.
    """
    counts, sizes = counts_of(model), kept.counts
    if sizes["channels"] < counts["channels"] and model.config.model_type.startswith("gemma"):
        raise WeftError(f"{type(model).__name__} scales its embeddings by their width; cut other units than channels.")
    made = type(model)._from_config(_config(model, sizes, kept.blocks.tolist()), dtype=model.dtype)
    source, (stack,) = model.state_dict(), block_stacks(model)
    own = {name: _of(source, name, target, kept, stack, counts) for name, target in made.state_dict().items()}
    made.load_state_dict(own, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    made.name_or_path = model.name_or_path
    return made.to(model.device).train(model.training)


def _config(model: Any, counts: Mapping[str, int], blocks: Sequence[int]) -> Any:
    """The configuration of so many units; lists with an entry a block keep those of the blocks that stay."""
    said, there = model.config.to_dict(), counts_of(model)
    queries = said["num_attention_heads"] // there["heads"]
    attention = model.get_submodule(blocks_of(model)[0]).get_submodule("self_attn")
    lists = {
        name: [value[i] for i in blocks]
        for name, value in said.items()
        if isinstance(value, list) and len(value) == there["blocks"] and name != "architectures"
    }
    return type(model.config).from_dict({
        **said,
        **lists,
        "num_hidden_layers": counts["blocks"],
        "hidden_size": counts["channels"],
        "intermediate_size": counts["neurons"],
        "num_attention_heads": counts["heads"] * queries,
        "num_key_value_heads": counts["heads"],
        "head_dim": attention.head_dim,
    })  # fmt: skip


def _of(
    source: Mapping[str, Tensor], name: str, target: Tensor, kept: Kept, stack: str, counts: Mapping[str, int]
) -> Tensor:
    """What a tensor of the smaller model is of the larger one's."""
    number, _, rest = name.removeprefix(f"{stack}.").partition(".")
    block = int(kept.blocks[int(number)]) if name.startswith(f"{stack}.") else 0
    whole = source[f"{stack}.{block}.{rest}" if name.startswith(f"{stack}.") else name]
    made = whole
    for side, axis in _sides(rest, whole, target, counts["channels"]):
        units = kept.channels if axis == "channels" else getattr(kept, axis)[block]
        width = whole.shape[side] // counts[axis]
        places = (units.unsqueeze(1) * width + torch.arange(width)).flatten().to(whole.device)
        made = made.index_select(side, places)
    if made.shape != target.shape:
        raise WeftError(
            f"{name} would be of {tuple(made.shape)}, and the smaller model's is of {tuple(target.shape)}: its sides "
            "follow other numbers than the units that are cut; cut other ones."
        )
    return made.clone()


def _sides(rest: str, whole: Tensor, target: Tensor, channels: int) -> Iterator[tuple[int, str]]:
    """(side, units along it) for each side of a tensor that is cut: those of a layer, and channels elsewhere."""
    layer = rest.rpartition(".")[0]
    if layer in _SIDES:
        yield from enumerate(_SIDES[layer][: whole.dim()])
        return
    cut = (side for side in range(whole.dim()) if whole.shape[side] != target.shape[side])
    yield from ((side, "channels") for side in cut if whole.shape[side] == channels)
