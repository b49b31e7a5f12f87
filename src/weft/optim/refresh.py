"""Choosing subspaces anew: which weights of a batch are due, and what becomes of their moments.

Every so many steps as in GaLore (Zhao et al., 2024, arXiv 2403.03507); by need, Q-GaLore (arXiv 2407.08296) looks at
how similar two subspaces in a row are, Lotus (arXiv 2602.01233) at how far the unit gradient has moved, and
`Refresh.energy` at how much of the gradient the basis still holds. Moments that turn with their basis are LDAdam's
(arXiv 2410.16103).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.linalg.subspace import upcast
from weft.optim.base import Frame, State
from weft.optim.batch import Batch, part
from weft.optim.projections import Whole

__all__ = ["refresh_subspaces"]


def refresh_subspaces(batch: Batch, ids: list[int], state: State, X: Tensor | None, seed: int, group_size: int) -> None:
    """Refresh those of the members `ids` that are due by the recipe's rule, from their gradients `X (k, n, s)`, or
    where that is None from stacks of them, of at most `batch.limit` members, that are made when they are needed.

    A weight's first subspace waits for its first gradient that is not zero; a later zero gradient leaves it as it is.
    Raises WeftError where a gradient is not finite.
    """
    if isinstance(batch.projection, Whole):
        return
    due = _due(batch, ids, state, X, seed, group_size)
    rounds = state["round"].tolist()
    for first in (True, False):
        chosen = [j for j in due if (rounds[j] == 0) is first]
        size = len(ids) if X is not None else batch.limit
        for start in range(0, len(chosen), size):
            run = chosen[start : start + size]
            here = batch.gradients([ids[j] for j in run]) if X is None else _take(X, run)
            if first or batch.recipe.refresh.every > 1:
                kept = _nonzero(batch, [ids[j] for j in run], here)
                run, here = [run[i] for i in kept], _take(here, kept)
            if run:
                with part(state, run) as some:
                    _choose(batch, [ids[j] for j in run], some, here, seed, first)


def _due(batch: Batch, ids: list[int], state: State, X: Tensor | None, seed: int, group_size: int) -> list[int]:
    """Positions in `ids` whose subspace is to be chosen anew."""
    rule, due = batch.recipe.refresh, []
    for j, (count, done) in enumerate(zip(state["count"].tolist(), state["round"].tolist(), strict=True)):
        phase = batch.members[ids[j]].index * rule.every // group_size if rule.stagger else 0
        if done == 0 or (count > 0 and (count + phase) % rule.every == 0):
            due.append(j)
    if rule.energy is not None and len(due) < len(ids):
        assert X is not None  # a batch with such a rule is stacked
        frame = batch.projection.frame(state, batch.seeds(ids, state, seed), X)
        faded = (_captured(frame, X, batch) < rule.energy * state["captured"]).tolist()
        due = sorted({*due, *(j for j, is_faded in enumerate(faded) if is_faded)})
    return due


def _nonzero(batch: Batch, ids: list[int], X: Tensor) -> list[int]:
    """Positions of those whose gradient holds anything."""
    norms = batch.rows.norm(X).flatten().tolist()
    for i, norm in zip(ids, norms, strict=True):
        if not norm < float("inf"):
            raise WeftError(
                f"The gradient of {batch.members[i].name} is not finite, so no subspace can be chosen from it; "
                'lower the learning rate, or build the optimizer with nonfinite="skip".'
            )
    return [j for j, norm in enumerate(norms) if norm > 0]


def _choose(batch: Batch, ids: list[int], state: State, X: Tensor, seed: int, first: bool) -> None:
    """New subspaces for all of a batch's part; moments kept, rotated or reset."""
    moments, projection = batch.recipe.moments, batch.projection
    old = None
    if moments == "rotate" and not first:
        before = {k: v.clone() for k, v in state.items() if k in projection.fields(batch.matrix)}
        old = projection.frame(before, batch.seeds(ids, state, seed), X)
    state["round"] += 1
    seeds = batch.seeds(ids, state, seed)
    projection.refresh(X, state, seeds, batch.rows, first)
    if old is not None:
        _rotate(batch, state, old, projection.frame(state, seeds, X))
    elif moments == "reset":
        for name in (*batch.inner_fields, "step"):
            state[name].zero_()
    if "captured" in state:
        state["captured"].copy_(_captured(projection.frame(state, seeds, X), X, batch))


def _rotate(batch: Batch, state: State, old: Frame, new: Frame) -> None:
    move = old.move(new)
    batch.recipe.inner.transfer(state, move)
    if "age" in state:
        state["age"].copy_(move(state["age"].unsqueeze(-2), 1).squeeze(-2))


def _captured(frame: Frame, X: Tensor, batch: Batch) -> Tensor:
    """The share (k,) of the gradient's energy inside the subspace."""
    inside, whole = upcast(frame.down(X)).square().sum((-2, -1)), upcast(X).square().sum((-2, -1))
    both = batch.rows.sum(torch.stack([inside, whole]))
    return (both[0] / both[1].clamp_min(torch.finfo(both.dtype).tiny)).float()


def _take(X: Tensor, chosen: Sequence[int]) -> Tensor:
    return X if len(chosen) == len(X) else X[list(chosen)]
