"""modegpt: matrices that meet in an inner dimension are cut together, each pair by the decomposition that suits what
stands between them (Lin et al., 2024, arXiv 2408.09632, ICLR 2025).

With C = E[x x^T] of a layer's inputs, for the k inner numbers that are kept:

    MLP            rows J of gate and up; down' = down C[:, J] C[J, J]^-1 (Nystroem)
    query, key     per key head, the largest E[q_i^2] E[k_i^2], in pairs that turn together (CR)
    value, output  per value head, O' = O R and V' = L V, R L of rank k (SVD)

J are the largest ridge leverages [C (C + lambda I)^-1]_jj of the neurons z = act(gate) up. L = U_k^T A and
R = B W_k S_k^-1, of the SVD A B = U S W^T with A^T A the sum of O^T O and B B^T = E[v v^T]: the product O V of rank k
that loses least on the data.

Sizes are shares of the inner dimension, 1 / `steps` apart. The allocation is by the blocks' influence
(`weft.allocate.modegpt`).

A layer keeps its width: rows that are cut are zeros of its output (`weft.terms.Submatrix`), so that every model's own
attention serves, surviving pairs keep their rotary frequencies and the scale of the scores, and a merged model is a
plain one of the old shapes. Products are smaller, activations and the cache of keys and values are not.

Deviations: the paper makes a smaller dense model of other head sizes. Values shared by several queries (grouped heads)
are cut by the best approximation for all their outputs together, where the paper takes the values' side alone. Biases
are in the moments of q, k and v. All statistics are those of the dense model. lambda is `ridge` times the mean of the
diagonal of C; the paper's value could not be confirmed. Layers in no joint (q, k and v in one matrix; queries behind a
norm; values behind a gate, which acts on each number of a head by itself) are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.methods.base import JointShape, Method, Shape, Site, Split, low_rank_terms
from weft.terms import Submatrix
from weft.terms.joints import Joint, joints
from weft.terms.submatrix import select

__all__ = ["METHOD", "cut_joints", "keeping", "largest", "reading", "sizes", "split"]

_LEAST = 1e-6
"""Of the mean of the diagonal of C: what is added to it where it is inverted."""


def split(site: Site, *, ridge: float = 1e-2, steps: int = 32) -> Split:
    """The members of a joint with `site.size` of its inner numbers left."""
    assert site.joint is not None
    if site.joint.kind == "mlp":
        return _neurons(site, ridge)
    return _scores(site, site.joint) if site.joint.kind == "query-key" else _values(site, site.joint)


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(inner numbers, bytes) in steps of 1 / `steps` of the inner dimension, of whole rotary pairs."""
    assert isinstance(shape, JointShape)
    joint = shape.joint
    unit = 2 if joint.partners else 1
    counts = {max(joint.width * i // (options["steps"] * unit), 1) * unit for i in range(1, options["steps"])}
    return [(k, joint.nbytes(k, shape.itemsize)) for k in sorted(counts) if k < joint.width]


def cut_joints(model: nn.Module, layers: Sequence[str]) -> list[Joint]:
    """All but values and outputs that a gate stands between: the decomposition mixes the numbers of a head."""
    return [joint for joint in joints(model, layers) if not joint.gated]


def _neurons(site: Site, ridge: float) -> Split:
    *writers, reader = site.members
    C = site.members[reader].moments["input_moment"]
    scale = C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    leverage = torch.linalg.solve(C + ridge * scale, C).diagonal()
    J = leverage.topk(site.rank).indices.sort().values
    W = site.members[reader].weight(C.dtype)
    read = torch.linalg.solve(select(C + _LEAST * scale, J, J), C[J] @ W.mT).mT  # (out, k)
    changed = -W
    changed[:, J] += read
    assert site.joint is not None
    parts = {role: keeping(site.members[role], site.joint.places(role, J)) for role in writers}
    return Split(members={**parts, reader: reading(site.members[reader], read, J)}, effect=(reader, changed))


def _scores(site: Site, joint: Joint) -> Split:
    queries, keys = (
        _energy(member).view(joint.members[role].copies, joint.width) for role, member in site.members.items()
    )
    worth = queries.view(len(keys), -1, joint.width).sum(1) * keys
    kept = largest(worth, site.rank, joint.partners)  # (key heads, k)
    rows = {
        role: joint.places(role, kept.repeat_interleave(member.copies // len(kept), dim=0))
        for role, member in joint.members.items()
    }
    q = next(iter(rows))
    changed = -site.members[q].weight()
    changed.index_fill_(0, rows[q], 0)
    return Split(
        members={role: keeping(site.members[role], places) for role, places in rows.items()}, effect=(q, changed)
    )


def largest(worth: Tensor, k: int, partners: tuple[int, ...] | None) -> Tensor:
    """The k columns (n, k), ascending, of the largest entries of each row of worth (n, width); whole pairs of them."""
    if partners is None:
        return worth.topk(k).indices.sort().values
    other = torch.tensor(partners, device=worth.device)
    first = (torch.arange(len(other), device=worth.device) < other).nonzero().squeeze(1)
    best = first[(worth + worth[:, other])[:, first].topk(k // 2).indices]
    return torch.cat([best, other[best]], dim=1).sort().values


def _values(site: Site, joint: Joint) -> Split:
    (role_v, v), (role_o, o) = site.members.items()
    width, k, groups = joint.width, site.rank, joint.members[role_v].copies
    V = v.weight(torch.float64).view(groups, width, -1)
    O = o.weight(torch.float64).view(o.shape[0], groups, -1, width).permute(1, 2, 0, 3)  # (groups, queries, out, width)
    A, B = (
        _root(t)
        for t in (
            (O.mT @ O).sum(1),
            _moment(v).view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1),
        )
    )
    U, s, Wt = torch.linalg.svd(A @ B)
    inverse = torch.where(s > 1e-12 * s[:, :1], 1 / s, 0)
    L, R = U[:, :, :k].mT @ A, B @ Wt[:, :k].mT * inverse[:, None, :k]  # (groups, k, width), (groups, width, k)
    first = torch.arange(k, device=V.device)
    rows, columns = joint.places(role_v, first), joint.places(role_o, first)
    read = (O @ R.unsqueeze(1)).permute(2, 0, 1, 3).reshape(o.shape[0], -1)
    changed = (O @ (R @ L).unsqueeze(1) - O).permute(2, 0, 1, 3).reshape(o.shape)
    bias = None if v.bias is None else (L @ v.bias.double().view(groups, width, 1)).flatten()
    return Split(
        members={role_v: _written(v, (L @ V).flatten(0, 1), rows, bias), role_o: reading(o, read, columns)},
        effect=(role_o, changed),
    )


def _root(M: Tensor) -> Tensor:
    """The symmetric square roots of a stack (n, h, h) of positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(M)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT


def _moment(site: Site) -> Tensor:
    """E[y y^T] (out, out) of a layer's outputs, its bias included."""
    W, C = site.weight(torch.float64), site.moments["input_moment"]
    moment = W @ C @ W.mT
    if site.bias is None:
        return moment
    b, mean = site.bias.double(), W @ site.moments["input_mean"]
    return moment + torch.outer(b, mean) + torch.outer(mean, b) + torch.outer(b, b)


def _energy(site: Site) -> Tensor:
    """E[y_i^2] (out,) of a layer's outputs."""
    W, C = site.weight(torch.float64), site.moments["input_moment"]
    energy = ((W @ C) * W).sum(1)
    if site.bias is None:
        return energy
    b = site.bias.double()
    return energy + 2 * b * (W @ site.moments["input_mean"]) + b.square()


def keeping(site: Site, rows: Tensor) -> Split:
    """The layer with these of its rows alone."""
    bias = None if site.bias is None else site.bias[rows]
    return _written(site, select(site.weight(torch.float64), rows, None), rows, bias)


def _written(site: Site, M: Tensor, rows: Tensor, bias: Tensor | None) -> Split:
    """A layer that writes M (k, in) x + bias at k of its outputs, zeros at the others."""
    term = Submatrix.of(M.to(site.dtype), site.shape, rows=rows)
    if bias is None:
        return Split({"submatrix": term})
    whole = torch.zeros(site.shape[0], dtype=site.dtype, device=M.device)
    return Split({"submatrix": term}, whole.index_copy(0, rows, bias.to(site.dtype)))


def reading(site: Site, M: Tensor, columns: Tensor) -> Split:
    """A layer that reads k of its inputs, by M (out, k)."""
    return Split({"submatrix": Submatrix.of(M.to(site.dtype), site.shape, columns=columns)})


METHOD = Method(
    name="modegpt",
    kind="compress",
    summary="Fewer neurons and smaller heads: Nystroem for MLPs, CR for queries and keys, SVD for values and outputs.",
    paper="Lin et al., 2024, arXiv 2408.09632",
    needs=("input_moment", "input_mean"),
    allocate="modegpt",
    split=split,
    sizes=sizes,
    joints=cut_joints,
    trained=low_rank_terms,
    least={"steps": 2},
    defaults={"ridge": 1e-2, "steps": 32},
)
