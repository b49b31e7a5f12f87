"""lrp-pruning: the units that explain the model's right answers least are cut (Yeom et al., 2021, arXiv 1912.08881; its
code seulkiyeom/LRP_pruning).

    R_j     relevance that the true tokens' logits send back to unit j, `weft.stats.relevance`
    score   sum over tokens of |R_j|, divided by its sum over the layer

Units are the neurons of MLPs and, in each value head, the numbers that reach the output projection. What they are worth
is ranked over all layers together, the least go until the budget is met (`weft.allocate.lrp_pruning`); what stays is as
it was. A few sequences do. `weft finetune OUT --method lrp-pruning` trains what is left.
Deviations: published networks are convolutional and their hidden layers propagate positive products alone (alpha 1,
beta 0); activations of transformers have both signs, so that the rule is epsilon's at epsilon 0, with the rules of
CP-LRP and AttnLRP for what bends. One cut, where the paper goes in small ones and scores again: compress what was
compressed for that. Queries and keys get no relevance, attention being held still, and stay; a block's value heads keep
one number of units each. Biases take their share of relevance. Of fused q, k and v (GPT-2) the attention bends, and is
left whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weft.methods.base import JointShape, Method, Shape, Site, Split, low_rank_terms
from weft.methods.modegpt import keeping, largest, reading
from weft.stats.relevance import unit_scores
from weft.terms.joints import Joint, joints
from weft.terms.submatrix import select

__all__ = ["METHOD", "cut_joints", "sizes", "split"]


def split(site: Site, *, steps: int) -> Split:
    """The members of a joint with `site.size` of its units left, the most relevant."""
    assert site.joint is not None
    joint, members = site.joint, site.members
    *writers, reader = members
    scores = unit_scores(joint, members[list(members)[-1]].moments["input_relevance"])
    kept = largest(scores, site.rank, None)
    repeated = {role: kept.repeat_interleave(joint.members[role].copies // len(kept), dim=0) for role in members}
    places = {role: joint.places(role, rows) for role, rows in repeated.items()}
    W = members[reader].weight(torch.float64)
    changed = -W
    changed[:, places[reader]] = 0
    parts = {role: keeping(members[role], places[role]) for role in writers}
    read = reading(members[reader], select(W, None, places[reader]), places[reader])
    return Split(members={**parts, reader: read}, effect=(reader, changed))


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(units, bytes) in steps of 1 / `steps` of them."""
    assert isinstance(shape, JointShape)
    joint = shape.joint
    counts = {max(joint.width * i // options["steps"], 1) for i in range(1, options["steps"])}
    return [(k, joint.nbytes(k, shape.itemsize)) for k in sorted(counts) if k < joint.width]


def cut_joints(model: nn.Module, layers: Sequence[str]) -> list[Joint]:
    """Those that relevance reaches."""
    return [joint for joint in joints(model, layers) if joint.kind != "query-key"]


METHOD = Method(
    name="lrp-pruning",
    kind="compress",
    summary="Neurons and numbers of value heads that explain the right answers least are cut.",
    paper="Yeom et al., 2021, arXiv 1912.08881",
    needs=("input_relevance",),
    allocate="lrp-pruning",
    split=split,
    sizes=sizes,
    joints=cut_joints,
    trained=low_rank_terms,
    least={"steps": 2},
    defaults={"steps": 32},
)
