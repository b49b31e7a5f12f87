"""All weights of one shape as one batch: their stacked state, their gradients, and the write-back of their update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.optim.base import Field, Inner, Matrix, Projection, Refresh, Residual, Rows, Scalar, State
from weft.optim.distributed import Layout, layout_of, local
from weft.optim.dither import stochastic_round
from weft.optim.limiter import NormGrowth
from weft.optim.projections import Blocks, Whole
from weft.seeds import mix

__all__ = ["COUNTERS", "Batch", "Member", "Recipe", "member_of", "part", "steps_apart"]

COUNTERS = ("step", "count", "round")  # gradients since the moments began, in all, and subspaces chosen so far


@dataclass(frozen=True)
class Recipe:
    """What a parameter group does: the four pieces, and how they are put together."""

    projection: Projection | Blocks
    inner: Inner
    residual: Residual | None
    limiter: NormGrowth | None
    refresh: Refresh
    moments: Literal["keep", "rotate", "reset"]
    scale: float
    side: Literal["short", "left", "right"]
    rounding: Literal["nearest", "stochastic", "master"]
    state_dtype: torch.dtype | None

    def describe(self) -> str:
        """What the layout of the state depends on, in a line; saved with it and compared when it is loaded."""
        named = ("projection", "inner", "residual", "limiter", "moments")
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name in named)


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter as the matrix (rows, cols) that its batch sees; `transposed` when the left side is projected."""

    parameter: Tensor
    name: str
    index: int  # its place in the group
    matrix: Matrix
    transposed: bool
    layout: Layout

    def view(self, tensor: Tensor) -> Tensor:
        """The local rows of the parameter, its gradient or its update as (rows, cols), sharing memory."""
        flat = _in_order(local(tensor), local(self.parameter))
        flat = flat.reshape(flat.shape[0], math.prod(flat.shape[1:])) if flat.ndim else flat.reshape(1, 1)
        return flat.mT if self.transposed else flat


def _in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """The dimensions after the first in the order in which those of `like` lie in memory, channels_last or another."""
    if tensor.ndim < 3:
        return tensor
    steps = like.stride()
    return tensor.permute(0, *sorted(range(1, tensor.ndim), key=lambda d: (-steps[d], d)))


def _rows_share_memory(parameter: Tensor) -> bool:
    """Whether a view of the parameter is its matrix, so that what is written there is written to it."""
    ordered = _in_order(parameter, parameter)
    inner = list(zip(ordered.shape[1:], ordered.stride()[1:], strict=True))
    inner = [(size, step) for size, step in inner if size != 1]
    return not parameter.numel() or all(step == size * after for (_, step), (size, after) in pairwise(inner))


def member_of(parameter: Tensor, name: str, index: int, recipe: Recipe) -> Member:
    """How a parameter enters a batch. Raises WeftError where the recipe does not fit its shape or layout."""
    layout, shape = layout_of(parameter, name), tuple(parameter.shape)
    projected = not isinstance(recipe.projection, Whole)
    if projected and len(shape) != 2:
        raise WeftError(
            f"{name} has shape {shape} and is in a projected group, which takes matrices only; "
            "put it in a group with projection=Whole()."
        )
    out, rest = (shape[0], parameter.numel() // max(shape[0], 1)) if shape else (1, 1)
    transposed = projected and (recipe.side == "left" or (recipe.side == "short" and out < rest))
    if transposed and layout.mesh is not None:
        if recipe.side == "left":
            raise WeftError(f'{name} is sharded on dimension 0, so it cannot be projected on it; use side="right".')
        transposed = False
    if not _rows_share_memory(local(parameter)):
        raise WeftError(f"{name} lies in memory in an order that is no matrix of {out} rows; call .contiguous() on it.")
    dtype = recipe.state_dtype or parameter.dtype
    matrix = Matrix(rest, out, dtype) if transposed else Matrix(out, rest, dtype)
    if projected and not isinstance(recipe.projection, Blocks):
        limit = matrix.cols if recipe.projection.indexed else min(out, rest)
        if recipe.projection.width(matrix) > limit:
            raise WeftError(
                f"{name} has shape {shape}, too small for {recipe.projection!r}; "
                f"use a rank of at most {limit}, or leave it out of the projected group."
            )
    return Member(parameter, name, index, matrix, transposed, layout)


def steps_apart(recipe: Recipe, projection: Projection, member: Member) -> bool:
    """Whether a step takes gradients one by one, without a stack of them or of their updates: for products alone or a
    factor of the gradient alone, in the weights' own dtype and one that is multiplied fast.
    """
    kept = recipe.residual is not None and recipe.residual.keeps_gradient and recipe.scale == 0
    exact = member.parameter.dtype in (torch.float32, torch.float64)
    fits = exact or (recipe.rounding == "nearest" and member.parameter.device.type != "cpu")
    plain = recipe.residual is None or kept
    return projection.dense and fits and plain and recipe.refresh.energy is None


@contextmanager
def part(state: State, ids: Sequence[int]) -> Iterator[State]:
    """The state of some of a batch's members; what is done to it in place is done to the batch."""
    if len(ids) == len(state["count"]):
        yield state
    elif list(ids) == list(range(ids[0], ids[-1] + 1)):
        yield {name: tensor[ids[0] : ids[-1] + 1] for name, tensor in state.items()}
    else:
        index = torch.tensor(ids)
        copies = {name: tensor[index.to(tensor.device)] for name, tensor in state.items()}
        yield copies
        for name, tensor in state.items():
            tensor[index.to(tensor.device)] = copies[name]


class Batch:
    """Members of one shape, layout, dtype and recipe, and their state stacked along a leading dimension."""

    def __init__(
        self, group: int, recipe: Recipe, projection: Projection, members: list[Member], limit: int, apart: bool
    ) -> None:
        self.group, self.recipe, self.projection, self.members = group, recipe, projection, members
        self.limit, self.apart = limit, apart  # gradients that may be stacked at once; whether a step never does it
        self.matrix, self.layout = members[0].matrix, members[0].layout
        self.rows: Rows = self.layout.rows(self.matrix.rows) if not members[0].transposed else Rows(self.matrix.rows)
        self.inner_fields = recipe.inner.fields(self._projected())
        self.fields = self._fields()
        self.state: State = {}

    def _projected(self) -> Matrix:
        return Matrix(self.matrix.rows, self.projection.width(self.matrix), self.matrix.dtype)

    def _fields(self) -> dict[str, Field]:
        recipe, width = self.recipe, self.projection.width(self.matrix)
        found = {name: Field((), torch.int64) for name in COUNTERS}
        found |= self.projection.fields(self.matrix) | self.inner_fields
        if recipe.limiter is not None and recipe.residual is not None:
            found |= recipe.limiter.fields(self.matrix)
        if recipe.moments == "rotate" and self.projection.indexed:
            found["age"] = Field((width,), torch.int32)
        if recipe.refresh.energy is not None:
            found["captured"] = Field((), torch.float32)
        if recipe.rounding == "master" and self.members[0].parameter.dtype in (torch.bfloat16, torch.float16):
            found["master"] = Field((self.matrix.rows, self.matrix.cols), torch.float32, rows=True)
        return found

    def local_shape(self, field: Field) -> tuple[int, ...]:
        """The part of a field that this process holds, for one member."""
        here = self.members[0].view(self.members[0].parameter)
        return (here.shape[0], *field.shape[1:]) if field.rows else field.shape

    def member_bytes(self) -> int:
        """Bytes of state a member."""
        return sum(math.prod(self.local_shape(field)) * field.dtype.itemsize for field in self.fields.values())

    def allocate(self, saved: dict[Tensor, Any]) -> None:
        """Stack the members' state from `saved` (zero where there is none) and put views of it in its place."""
        for name, field in self.fields.items():
            device = torch.device("cpu") if name in COUNTERS else local(self.members[0].parameter).device
            stack = torch.zeros(len(self.members), *self.local_shape(field), dtype=field.dtype, device=device)
            for row, member in zip(stack, self.members, strict=True):
                if name in saved.get(member.parameter, {}):
                    self._restore(row, saved[member.parameter][name], name, member)
            self.state[name] = stack
        for i, member in enumerate(self.members):
            saved[member.parameter] = {name: self._view(name, i) for name in self.fields}

    def _restore(self, row: Tensor, value: Any, name: str, member: Member) -> None:
        value = local(torch.as_tensor(value))
        if value.shape != row.shape:
            raise WeftError(
                f"The saved {name} of {member.name} has shape {tuple(value.shape)}, this optimizer needs "
                f"{tuple(row.shape)}; build it with the rank, side and sharding of the saved one."
            )
        row.copy_(value)

    def _view(self, name: str, i: int) -> Tensor:
        field, tensor = self.fields[name], self.state[name][i]
        sharded = field.rows and not self.members[0].transposed
        return self.layout.wrap(tensor, field.shape) if sharded else tensor

    def views(self, ids: Sequence[int]) -> list[Tensor]:
        """The gradients (n, s) of some members, as they are."""
        return [self.members[i].view(self.members[i].parameter.grad) for i in ids]  # type: ignore[arg-type]

    def gradients(self, ids: Sequence[int]) -> Tensor:
        """X (k, n, s) of some members; half precision becomes fp32 on a CPU, where half products are slow."""
        views = self.views(ids)
        if len(views) == 1:
            X = views[0].unsqueeze(0)
        elif self.members[0].transposed:  # stack as they lie in memory
            X = torch.stack([v.mT for v in views]).mT
        else:
            X = torch.stack(views)
        return X.float() if X.device.type == "cpu" and X.dtype in (torch.bfloat16, torch.float16) else X

    def seeds(self, ids: Sequence[int], state: State, seed: int) -> list[int]:
        """One seed a member, from its place and how many subspaces it has had."""
        rounds = state["round"].tolist()
        return [mix(seed, self.group, self.members[i].index, r) for i, r in zip(ids, rounds, strict=True)]

    def apply(
        self, ids: Sequence[int], U: Tensor, factor: Scalar, state: State, lr: float, decay: float, seed: int,
        rows: slice = slice(None),
    ) -> None:  # fmt: skip
        """W <- W - lr factor U with decoupled weight decay, for some members and rows, rounded as the recipe says."""
        if isinstance(factor, Tensor):
            U, factor = U * factor, 1.0
        weights = [self.members[i].view(self.members[i].parameter)[rows] for i in ids]
        keep, first = 1 - lr * decay, self.recipe.inner.decay_first
        exact = weights[0].dtype in (torch.float32, torch.float64)
        if self.recipe.rounding == "nearest" or exact:
            targets, update = weights, (U.to(weights[0].dtype) if U.is_cuda else U).unbind(0)
        else:
            wide = state["master"][:, rows] if "master" in state else torch.stack(weights).float()
            targets, update = list(wide.unbind(0)), U.to(wide.dtype).unbind(0)
        if decay and first:
            torch._foreach_mul_(targets, keep)
        torch._foreach_add_(targets, update, alpha=-lr * factor)
        if decay and not first:
            torch._foreach_mul_(targets, keep)
        if targets is not weights:
            torch._foreach_copy_(weights, self._rounded(wide, self.members[ids[0]], seed, rows).unbind(0))

    def add_products(self, ids: Sequence[int], N: Tensor, P: Tensor, factor: float, lr: float, decay: float) -> None:
        """W <- W - lr factor N P^T with decoupled weight decay, where each product is added as it is made."""
        weights = self._decayed(ids, lr, decay, first=True)
        for W, n, p in zip(weights, N.to(P.dtype), P, strict=True):
            W.addmm_(n, p.mT, alpha=-lr * factor)
        self._decayed(ids, lr, decay, first=False)

    def add_scaled(
        self, ids: Sequence[int], E: Sequence[Tensor], f: Tensor, factor: float, lr: float, decay: float
    ) -> None:
        """W <- W - lr factor f E with decoupled weight decay, for E (n, s) of each member and f (k, n or 1, 1)."""
        weights = self._decayed(ids, lr, decay, first=True)
        for W, one, scale in zip(weights, E, f, strict=True):
            W.addcmul_(one, scale, value=-lr * factor)
        self._decayed(ids, lr, decay, first=False)

    def _decayed(self, ids: Sequence[int], lr: float, decay: float, *, first: bool) -> list[Tensor]:
        """The weights (n, s), decayed if the inner rule does it at this point."""
        weights = [self.members[i].view(self.members[i].parameter) for i in ids]
        if decay and first is self.recipe.inner.decay_first:
            torch._foreach_mul_(weights, 1 - lr * decay)
        return weights

    def _rounded(self, wide: Tensor, first: Member, seed: int, rows: slice) -> Tensor:
        if self.recipe.rounding == "master":
            return wide
        rank = 0 if self.rows.group is None else torch.distributed.get_rank(self.rows.group)
        numbers = (seed, self.group, first.index, rank, rows.start or 0)
        generator = torch.Generator(wide.device).manual_seed(mix(*numbers))
        return stochastic_round(wide, first.parameter.dtype, generator)
