"""Joints: layers of a block that meet in an inner dimension, which is cut in all of them together.

    mlp            rows of gate and up (or of the one before it), columns of down            the neurons
    query-key      rows of q and k, the same ones in every head                              numbers of a head
    value-output   rows of v, columns of o                                                   numbers of a head

They are told by the layers' names, which are few over all models, and by their shapes; what stands between the layers
must act on each inner number by itself, so that where a norm does not, there is no joint. Values and outputs whose
attention has further numbers of its own, such as a gate, are joined and marked: numbers of a head may be chosen there,
not mixed. Layers that hold q, k and v in one matrix, rotary embeddings of a part of the head and attention with latents
have none of the last two.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from weft.terms.layers import shape_of

__all__ = ["Joint", "Member", "joints", "layers_of"]

_MLPS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("w1", "w3", "w2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_HALVES = ("gate_up_proj",)
"""Layers of which the first half of the rows is the gate's, and the second what it gates."""
_OUTPUTS = ("o_proj", "out_proj", "dense")
_JOIN = "+"


@dataclass(frozen=True)
class Member:
    """A layer of a joint: `copies` times the inner numbers lie along its rows (side 0) or columns (side 1)."""

    layer: str
    side: int
    copies: int
    other: int  # length of the other side


@dataclass(frozen=True)
class Joint:
    """Layers that meet in an inner dimension.

    Args:
        kind: "mlp", "query-key" or "value-output".
        members: by role, in the order of their layers.
        width: of the inner dimension: neurons, or the numbers of one head.
        partners: of each inner number, the one that rotary embeddings turn with it, so that both are kept or none;
            None where each stands alone.
        gated: of values and outputs: whether more than sums over tokens may stand between them, such as a gate.
    """

    kind: str
    members: Mapping[str, Member]
    width: int
    partners: tuple[int, ...] | None = None
    gated: bool = False

    @property
    def name(self) -> str:
        """The layers' names as one: the first in full, then what the others differ in."""
        first, *rest = (member.layer for member in self.members.values())
        return _JOIN.join([first, *(layer.rpartition(".")[2] for layer in rest)])

    @property
    def groups(self) -> int:
        """In how many parts the inner dimension is cut, each by itself: value heads or key heads; an MLP is one."""
        return min(member.copies for member in self.members.values())

    @property
    def numel(self) -> int:
        """Numbers of all the members' matrices."""
        return sum(m.copies * self.width * m.other for m in self.members.values())

    def nbytes(self, size: int, itemsize: int) -> int:
        """Bytes of the members with `size` inner numbers left, the 32-bit places among them."""
        return sum(m.copies * size * (m.other * itemsize + 4) for m in self.members.values())

    def places(self, role: str, kept: Tensor) -> Tensor:
        """Where the kept inner numbers lie in a member: `kept` (copies, k) or (k,) for every copy -> (copies k,)."""
        copies = self.members[role].copies
        kept = kept.expand(copies, -1) if kept.dim() == 1 else kept
        starts = torch.arange(copies, device=kept.device).unsqueeze(1) * self.width
        return (starts + kept).flatten()


def layers_of(site: str) -> list[str]:
    """The layers that a site's name stands for: itself, or those of a joint."""
    first, *rest = site.split(_JOIN)
    parent = first.rpartition(".")[0]
    return [first, *(f"{parent}.{name}" if parent else name for name in rest)]


def joints(model: nn.Module, layers: Iterable[str]) -> list[Joint]:
    """All joints among these linear layers of a transformers model, in the model's order; each layer is in one."""
    there, found = set(layers), list[Joint]()
    for path, module in model.named_modules():
        names = dict(module.named_children())
        within = {n: f"{path}.{n}".lstrip(".") for n in names if f"{path}.{n}".lstrip(".") in there}
        found += chain(_mlp(module, within), _attention(model, module, within))
    return found


def _mlp(module: nn.Module, within: Mapping[str, str]) -> Iterator[Joint]:
    names = next((names for names in _MLPS if all(name in within for name in names)), ())
    if not names:
        return
    *writers, reader = names
    width = shape_of(module.get_submodule(reader))[1]
    rows = {name: (2 if name in _HALVES else 1) * width for name in writers}
    plain = all(shape_of(module.get_submodule(name))[0] == count for name, count in rows.items())
    if not plain or _stands_between(module, names, width):
        return
    members = {
        name: Member(within[name], 0, count // width, shape_of(module.get_submodule(name))[1])
        for name, count in rows.items()
    }
    members[reader] = Member(within[reader], 1, 1, shape_of(module.get_submodule(reader))[0])
    yield Joint("mlp", members, width)


def _stands_between(module: nn.Module, names: Iterable[str], width: int) -> bool:
    """Whether the neurons know of each other: a norm over all of them, or Gemma 3n's threshold from all gates."""
    if getattr(module, "activation_sparsity", 0.0):
        return True
    others = (child for name, child in module.named_children() if name not in set(names))
    return any(tuple(p.shape) == (width,) for child in others for p in child.parameters())


def _attention(model: nn.Module, module: nn.Module, within: Mapping[str, str]) -> Iterator[Joint]:
    output = next((name for name in _OUTPUTS if name in within), "")
    config = getattr(module, "config", getattr(model, "config", None))
    width = getattr(module, "head_dim", None)
    if not (output and {"q_proj", "k_proj", "v_proj"} <= within.keys() and isinstance(width, int)):
        return
    rows = {name: shape_of(module.get_submodule(name))[0] for name in ("q_proj", "k_proj", "v_proj")}
    read = shape_of(module.get_submodule(output))[1]
    heads = getattr(config, "num_attention_heads", 0)
    if read != heads * width or rows["v_proj"] % width or heads % max(rows["v_proj"] // width, 1):
        return
    norms = [name for name, _ in module.named_modules() if "norm" in name]

    def member(name: str, side: int) -> Member:
        shape = shape_of(module.get_submodule(name))
        return Member(within[name], side, shape[side] // width, shape[1 - side])

    known, partners = _partners(config, module, width)
    if not norms and known and rows["q_proj"] == read and rows["k_proj"] == rows["v_proj"]:
        yield Joint("query-key", {n: member(n, 0) for n in ("q_proj", "k_proj")}, width, partners)
    if all("q_norm" in name or "k_norm" in name for name in norms):
        gated = rows["q_proj"] != read or _has_more(module, {"q_proj", "k_proj", "v_proj", output})
        yield Joint("value-output", {"v_proj": member("v_proj", 0), output: member(output, 1)}, width, gated=gated)


def _has_more(module: nn.Module, names: Collection[str]) -> bool:
    """Whether attention has further numbers than these layers and norms of queries and keys; sinks belong to a head."""
    others = (child for name, child in module.named_children() if name not in names and "norm" not in name)
    return any(True for child in others for _ in child.parameters())


def _partners(config: Any, module: nn.Module, width: int) -> tuple[bool, tuple[int, ...] | None]:
    """Whether it is known which numbers of a head rotary embeddings turn together, and the partner of each, if any."""
    code = vars(sys.modules[type(module).__module__])
    rotary = getattr(config, "rope_parameters", None) or {}
    if not rotary and not any("rot" in name.lower() for name in code):
        return True, None
    turn, parts = code.get("rotate_half"), [rotary, *(r for r in rotary.values() if isinstance(r, Mapping))]
    if turn is None or not rotary or any(part.get("partial_rotary_factor", 1.0) != 1.0 for part in parts):
        return False, None
    turned = turn(torch.eye(width)).abs()  # row i is nonzero where number i ends up
    return True, tuple(turned.argmax(1).tolist())
