"""LoRAM: train an adapter on a pruned copy of the model, infer with it on the whole one (2025, arXiv 2502.13533).

    A[:, C] = A_p,  B[R] = B_p,  zero elsewhere

for a matrix W (out, in) with the kept rows R and columns C, so that the adapter B_p A_p of the cut one has r (|R| +
|C|) trainable numbers. A neuron is a row of gate and up with its column of down; a KV group a head of k and v with its
query heads of q and columns of o; the residual width is never cut. Groups are ranked by sum |w g| over their entries
(LLM-Pruner; with data) or drawn. Inference is with the ORIGINAL weights, not those of an aligned pruned copy.
`weft.verbs.loram` does it: choose, prune, recover.
Deviations: the output head is not adapted (weft's linear layers are those of the blocks); a mask (unstructured pruning)
leaves all shapes as they are, so its adapter needs no recovery and nothing here; columns are recovered with zeros (the
official option of noise changes the function).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from weft.methods.base import Method
from weft.terms.layers import shape_of
from weft.terms.submatrix import select

__all__ = ["METHOD", "cut", "kept_sets", "scatter", "worth"]


def worth(block: nn.Module, grads: Mapping[str, Tensor] | None, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The worth of each neuron (n,) and of each KV group (h,): sum |w g| over its rows and columns, or noise."""
    neurons, groups = shape_of(block.get_submodule("mlp.gate_proj"))[0], _groups(block)
    if grads is None:
        return torch.rand(neurons, generator=random), torch.rand(groups, generator=random)
    taylor = {n: (block.get_submodule(n).weight.detach().float() * g.float()).abs().cpu() for n, g in grads.items()}  # type: ignore[operator, union-attr]
    gate, up, down = (taylor[f"mlp.{n}_proj"] for n in ("gate", "up", "down"))
    q, k, v, o = (taylor[f"self_attn.{n}_proj"] for n in "qkvo")
    per_row = [t.sum(1).view(groups, -1).sum(1) for t in (q, k, v)]
    return gate.sum(1) + up.sum(1) + down.sum(0), sum(per_row, start=o.sum(0).view(groups, -1).sum(1))


def kept_sets(block: nn.Module, worth: tuple[Tensor, Tensor], ratio: float) -> dict[tuple[str, int], Tensor]:
    """(layer, 0 for rows or 1 for columns) -> what is kept, ascending."""
    neurons, groups = (w.topk(max(round((1 - ratio) * len(w)), 1)).indices.sort().values for w in worth)

    def entries(layer: str, side: int) -> Tensor:  # of whole heads
        width = shape_of(block.get_submodule(f"self_attn.{layer}_proj"))[side] // len(worth[1])
        return (groups.unsqueeze(1) * width + torch.arange(width)).flatten()

    attention = {
        (f"self_attn.{n}_proj", side): entries(n, side) for n, side in (("q", 0), ("k", 0), ("v", 0), ("o", 1))
    }
    return attention | {(f"mlp.{n}_proj", side): neurons for n, side in (("gate", 0), ("up", 0), ("down", 1))}


def _groups(block: nn.Module) -> int:
    """The number of KV heads."""
    head: int = block.get_submodule("self_attn").head_dim  # type: ignore[assignment]
    return shape_of(block.get_submodule("self_attn.k_proj"))[0] // head


def cut(layer: nn.Linear, rows: list[int] | None, columns: list[int] | None) -> nn.Linear:
    """The layer of these rows and columns alone; None keeps all."""
    weight, bias = select(layer.weight.detach(), rows, columns), None if layer.bias is None else layer.bias.detach()
    bias = bias if bias is None or rows is None else bias[rows]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=layer.bias.requires_grad)
    return made


def scatter(
    B: Tensor, A: Tensor, rows: Sequence[int], columns: Sequence[int], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The factors B (|R|, r), A (r, |C|) of a cut layer as those of the whole one: (out, r), (r, in)."""
    full_B, full_A = torch.zeros(shape[0], B.shape[1]), torch.zeros(A.shape[0], shape[1])
    full_B[torch.tensor(rows)], full_A[:, torch.tensor(columns)] = B.float(), A.float()
    return full_B, full_A


METHOD = Method(
    name="loram",
    kind="prune",
    summary="train an adapter on a copy without most neurons and attention groups, use it on the whole model",
    paper="Zhang et al., 2025, arXiv 2502.13533",
    needs=("mean_grad",),
    defaults={"ratio": 0.85, "first": 4, "last": 2},
)
