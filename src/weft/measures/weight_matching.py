"""weight-matching: whether two models have the same neurons and heads in another order (Ainsworth et al., 2022, arXiv
2209.04836; what it says of a merge: Ito et al., 2024, arXiv 2402.04051).

    P = argmax sum over the layers of a joint of <W, P W0>  (rows) or <W, W0 P^T>  (columns)

An order of neurons is one for gate, up and down; one of heads for q, k, v and o, where heads that share a key stay
together. Since blocks meet in the residual stream alone, whose order is left as it is, each P is one linear assignment
and the optimum, not a step of a descent. Models trained from two seeds match far better than they lie; two that were
made from one checkpoint are in order as they are, and a P that moves much there says that they are not.

Source: github.com/samuela/git-re-basin.
Deviations: the residual stream and the numbers within a head keep their order; the alignment of singular vectors, by
which the second paper predicts a merge, is left out: how it is taken was not to be found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.measures.base import Measure
from weft.terms.joints import Joint, joints
from weft.terms.layers import bias_of, linear_layers, weight_of

__all__ = ["MEASURE", "Side", "assignment", "grouped_assignment", "likeness", "permuted", "value"]


class Side(NamedTuple):
    """The side of a layer's matrix along which units lie, 0 rows or 1 columns, all of them so many times in turn."""

    layer: str
    side: int
    copies: int = 1


def value(model: nn.Module, other: nn.Module) -> dict[str, dict[str, float]]:
    """{layer: {"moved", "matched"}, "": {"units_moved", "distance_saved"}} of the layers of every joint.

    Raises WeftError where there is no joint, or a layer of another shape in the other model.
    """
    found: dict[str, dict[str, float]] = {}
    before = after = moved = units = 0.0
    for sides, order in _matches(model, other):
        changed = int((order != torch.arange(len(order))).sum())
        moved, units = moved + changed, units + len(order)
        for layer, side, copies in sides:
            W, W0 = (weight_of(m.get_submodule(layer), torch.float32) for m in (model, other))
            matched = W - permuted(W0, side, order, copies)
            before, after = before + float((W - W0).square().sum()), after + float(matched.square().sum())
            size = float(W0.norm())
            found[layer] = {
                "moved": changed / len(order), "matched": float(matched.norm()) / size if size else math.nan
            }  # fmt: skip
    if not found:
        raise WeftError(
            f"{type(model).__name__} has no MLP or attention whose units weft knows; leave this measure out."
        )
    return {**found, "": {"units_moved": moved / units, "distance_saved": 1 - after / before if before else 0.0}}


def _matches(model: nn.Module, other: nn.Module) -> Iterator[tuple[list[Side], Tensor]]:
    """Sides, and the order of the units along them: unit i of the model is unit order[i] of the other."""
    for joint in joints(model, linear_layers(model)):
        if joint.kind == "mlp":
            sides = [Side(member.layer, member.side, member.copies) for member in joint.members.values()]
            yield sides, assignment(_likeness(model, other, sides, joint.width))
        elif joint.kind == "value-output":
            yield from _heads(model, other, joint)


def _heads(model: nn.Module, other: nn.Module, joint: Joint) -> Iterator[tuple[list[Side], Tensor]]:
    v, o = joint.members.values()
    parent = v.layer.rpartition(".")[0]
    q, k = (f"{parent}.{name}".lstrip(".") for name in ("q_proj", "k_proj"))
    heads, groups = [Side(q, 0), Side(o.layer, 1)], [Side(k, 0), Side(v.layer, 0)]
    order, outer = grouped_assignment(
        _likeness(model, other, groups, v.copies), _likeness(model, other, heads, o.copies)
    )
    yield heads, order
    yield groups, outer


def _likeness(model: nn.Module, other: nn.Module, sides: list[Side], units: int) -> Tensor:
    """(units, units): the inner product of each unit of the model with each of the other, over all their layers."""
    total = torch.zeros(units, units, dtype=torch.float64)
    for layer, side, copies in sides:
        ours, theirs = model.get_submodule(layer), other.get_submodule(layer)
        W, W0 = weight_of(ours, torch.float32), weight_of(theirs, torch.float32)
        if W.shape != W0.shape:
            raise WeftError(f"{layer} is of another shape in the other model: only models of one shape match.")
        total += likeness(W, W0, side, units, copies)
        b, b0 = bias_of(ours), bias_of(theirs)
        if side == 0 and b is not None and b0 is not None:
            total += likeness(b.detach().float()[:, None], b0.detach().float()[:, None], 0, units, copies)
    return total


def likeness(W: Tensor, W0: Tensor, side: int, units: int, copies: int = 1) -> Tensor:
    """(units, units) inner products, in fp64 on the CPU, of the units along a side of W and W0 (out, in)."""
    parts = [(M if side == 0 else M.mT).reshape(copies, units, -1).transpose(0, 1).flatten(1) for M in (W, W0)]
    return (parts[0] @ parts[1].mT).double().cpu()


def assignment(likeness: Tensor) -> Tensor:
    """order (n,): the permutation with the largest sum of likeness[i, order[i]]."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])


def grouped_assignment(groups: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of members (n,), who stay with their group, and of groups (k,), of the largest sum of both likenesses.

    Args:
        groups: (k, k) likeness.
        members: (n, n), n / k in a row to a group.
    """
    k, each = len(groups), len(members) // len(groups)
    blocks = members.view(k, each, k, each).transpose(1, 2)  # (k, k, each, each)
    inner = torch.stack([torch.stack([assignment(block) for block in row]) for row in blocks])  # (k, k, each)
    best = blocks.gather(3, inner.unsqueeze(3)).sum((2, 3))
    outer = assignment(groups + best)
    return torch.cat([outer[i] * each + inner[i, outer[i]] for i in range(k)]), outer


def permuted(W: Tensor, side: int, order: Tensor, copies: int = 1) -> Tensor:
    """W (out, in) with its units along a side in this order."""
    rows = W if side == 0 else W.mT
    moved = rows.reshape(copies, len(order), -1, rows.shape[1])[:, order.to(W.device)].reshape(rows.shape)
    return moved if side == 0 else moved.mT


MEASURE = Measure(
    name="weight-matching",
    summary="The order of neurons and heads in which two models are most alike.",
    paper="Ainsworth et al., 2022, arXiv 2209.04836; Ito et al., 2024, arXiv 2402.04051",
    value=value,
    of="models",
    reads={
        "moved": "share of the neurons or heads that another order would move; 0: in order as they are",
        "matched": "distance after reordering, a share of the other matrix",
    },
    reads_model={
        "units_moved": "0: made from one checkpoint; near 1: trained apart, reorder before merging",
        "distance_saved": "share of the squared distance that reordering takes away",
    },
    cost="a linear assignment a block, cubic in the number of neurons",
)
