"""How `compress` puts what was decided into the model, layer by layer.

    one_shot     each layer becomes the surveyed terms of its size
    sequential   walk the blocks; split each group of layers anew on the inputs that it gets in the model changed so far

With a `Store` that has a directory, finished blocks are kept on disk, and an interrupted run goes on from them to the
same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from weft.linalg.whiten import moment_root
from weft.methods.base import Moments, Size, Split
from weft.runs.pieces import Piece, Store, named, packed, unpacked
from weft.signals import finishing
from weft.stats.calibrate import Batch, frozen, layers_by_block, mean_loss
from weft.stats.collect import INPUT_NEEDS
from weft.stats.walk import walk
from weft.terms import Dense, SumLinear
from weft.terms.adapters import base_terms
from weft.terms.joints import layers_of
from weft.terms.layers import replace as replace_layer
from weft.terms.put import KEEP, put
from weft.verbs.survey import Plan, carried_moments, check_finite, piece_name, site_of, surveyed_split

__all__ = ["measure", "one_shot", "place", "sequential"]

Sizes = Mapping[str, Size]


def place(model: nn.Module, plan: Plan, name: str, split: Split) -> dict[str, SumLinear]:
    """Put the terms in the layer's place, or beside what it has where the method compensates; of a joint, in the place
    of each of its layers. Returns what stands there now, by layer.
    """
    joint = plan.joints.get(name)
    if joint is not None:
        parts = [place(model, plan, joint.members[role].layer, part) for role, part in split.members.items()]
        return {layer: made for part in parts for layer, made in part.items()}
    beside = base_terms(model, name) if plan.method.kind == "compensate" else {}
    return {name: put(model, name, {**beside, **split.terms}, KEEP if split.bias is None else split.bias)}


def one_shot(model: nn.Module, plan: Plan, sizes: Sizes, store: Store) -> set[str]:
    """Every layer that has a size becomes what the survey made of it at that size; those layers, or joints."""
    for name, split in surveyed_split(model, plan, store):
        if sizes[name] is not None:
            place(model, plan, name, split(sizes[name]))
    return {name for name, size in sizes.items() if size is not None}


def measure(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], store: Store
) -> Callable[[str, Sequence[Size]], list[float]]:
    """(layer, sizes) -> the loss a token of all the calibration text, with only that layer cut to each size. Finished
    ones are kept in the store.
    """
    block_of = {name: i for i, names in enumerate(layers_by_block(model, plan.sites)) for name in names}
    now: dict[int, dict[str, Callable[[Size], Split]]] = {}

    @torch.no_grad()
    def loss(name: str, size: Size) -> dict[str, Tensor]:
        if block_of[name] not in now:
            now.clear()
            now[block_of[name]] = dict(surveyed_split(model, plan, store, block_of[name]))
        before = {layer: model.get_submodule(layer) for layer in layers_of(name)}
        try:
            with frozen(model):
                place(model, plan, name, now[block_of[name]][name](size))
                return {"loss": torch.tensor(mean_loss(model, batches), dtype=torch.float64)}
        finally:
            for layer, module in before.items():
                replace_layer(model, layer, module)

    def losses(name: str, sizes: Sequence[Size]) -> list[float]:
        pieces = [store.once(named("measure", name, size), partial(loss, name, size)) for size in sizes]
        return [float(piece["loss"]) for piece in pieces]

    return losses


def sequential(model: nn.Module, plan: Plan, sizes: Sizes, batches: Sequence[Batch], store: Store) -> set[str]:
    """Walk the blocks, replacing each group of layers on the inputs it gets after everything before it was replaced;
    the layers that were: an expert may lose all its tokens on the way, and stays.

    With `plan.correction` = a > 0, the target is not this layer's own map W but W ((1 - a) X + a C) X^-1, where
    X = E[x x^T] of the inputs x now and C = E[x_o x^T] with the inputs x_o of the original model: the least-squares
    map from x to the mix (1 - a) W x + a W x_o. It is the objective of SAES-SVD (Hu et al., 2026, arXiv 2602.03051),
    ||(W' - W) x||^2 + alpha ||W' x - W x_o||^2 with alpha = a / (1 - a), in the method's own metric.
    Deviations: one share for all layers, where the paper chooses alpha for each; a mixture's experts are not corrected.
    """
    piece_of = {name: i for i, names in enumerate(layers_by_block(model, plan.layers)) for name in names}
    placed = set[str]()

    def key(block: str) -> str:
        return named(f"block-{block}" if plan.stage == 0 else f"block-{plan.stage}-{block}", dict(sizes))

    def restore(block: str) -> bool:
        done = store.get(key(block))
        for name in done.words if done else ():
            terms, bias = unpacked(done, name, model.get_submodule(name))  # type: ignore[arg-type]
            place(model, plan, name, Split(terms, bias))
            placed.add(name)
        return done is not None

    needs = [need for need in INPUT_NEEDS if need in plan.reads_of or need == "input_moment"]
    groups = walk(model, batches, plan.layers, needs, original=plan.correction > 0, done=restore, track=plan.track)
    for block, members in groupby(groups, key=lambda group: group.block):
        changed = Piece({"": torch.zeros(1)})  # a block that stays as it is is finished too
        kept: Piece | None = None
        with finishing():
            for group in members:
                if plan.carried and kept is None:
                    kept = store.get(piece_name(plan, piece_of[group.names[0]]))
                for name in (name for name in group.names if sizes[name] is not None):
                    moments = {**group.moments, **carried_moments(plan, kept, name)}
                    split = _split(model, plan, name, sizes[name], moments)
                    place(model, plan, name, split)
                    placed.add(name)
                    changed.add(packed(name, split.terms, split.bias))
            store.put(key(block), changed)
    return placed


def _split(model: nn.Module, plan: Plan, name: str, size: Size, moments: Moments) -> Split:
    assert plan.method.split is not None
    site = site_of(model, plan, name, {}, size)
    site = replace(site, moments={need: tensor.to(site.device) for need, tensor in moments.items()})
    check_finite(site)
    if plan.correction and "cross_moment" in site.moments:
        W, X = site.weight(torch.float64), site.moments["input_moment"]
        target = Dense.from_matrix(_corrected(W, X, site.moments["cross_moment"], plan.correction))
        site = replace(site, terms={"base": target}, original=W)
    return plan.method.split(site, **plan.options)


def _corrected(W: Tensor, X: Tensor, C: Tensor, a: float) -> Tensor:
    """W ((1 - a) X + a C) X^-1, one ridge on both moments."""
    ridge = 1e-4
    root = moment_root(X, ridge=ridge)
    mixed = (1 - a) * X + a * C + torch.eye(len(X), dtype=X.dtype, device=X.device) * (ridge * X.diagonal().mean())
    return root.solve_transposed(root.solve((W @ mixed).mT)).mT
