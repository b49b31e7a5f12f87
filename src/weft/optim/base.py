"""The contract of the subspace optimizers: an update is projection x inner rule x residual x limiter.

A weight is seen as a matrix `X (n, s)`: `s` is the side that is projected, `n` the other one (`Matrix`). All weights of
one shape are stepped together, so every tensor below has a leading batch dimension k. One step, for the gradient X:

    R = frame.down(X)                        (k, n, r)   the projection's basis P (k, s, r): R = X P
    N, c = inner.update(R, state)            (k, n, r)   Adam, SGD, Lion ...; c the bias correction
    E, f = residual.term(X, R, N, frame)     (k, n, s)   what the subspace left out, and a factor a row or a matrix
    f = f * limiter.factor(E, f, state)                  how fast that may grow
    W -= lr * (scale * c * N P^T + f * E)                c multiplies the second term too where `residual.corrected`

A piece is a frozen dataclass: it holds hyperparameters, never tensors. What it must remember it declares as `fields`;
the optimizer allocates them, zero-filled, one stacked tensor a name and batch, and hands them in as `State`. A piece
changes its state in place. This is all a new projection or inner rule has to know: distribution, batching, checkpoints
and rounding are the optimizer's business, except that a sum over `n` must go through `rows.sum`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Field", "Frame", "Inner", "Matrix", "Move", "Projection", "Refresh", "Residual", "Rows", "Scalar", "State"]

State = dict[str, Tensor]  # name -> (k, *field.shape)
Scalar = Tensor | float  # a number, or one that broadcasts over (k, n, s)
Move = Callable[[Tensor, int], Tensor]  # (moments (k, n, r), their power 1 or 2) -> the same in the new basis


@dataclass(frozen=True)
class Matrix:
    """The shape a piece works on: `rows` n (over all processes), `cols` s or r, and the dtype that state is kept in."""

    rows: int
    cols: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Field:
    """One state tensor of one weight. `rows`: its first dimension runs over the n rows, so it is sharded as they
    are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: bool = False


@dataclass(frozen=True)
class Rows:
    """Where the n rows live: all here (`group` None), or spread over a process group. `total` is n."""

    total: int
    group: torch.distributed.ProcessGroup | None = None

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over all processes of a quantity summed over the local rows."""
        if self.group is None:
            return partial
        total = partial.contiguous().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def norm(self, x: Tensor) -> Tensor:
        """Frobenius norms of `x (k, n, s)`, all rows counted: `(k, 1, 1)` in fp32 or fp64."""
        high = torch.promote_types(x.dtype, torch.float32)
        here: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=high)
        return here if self.group is None else self.sum(here.square()).sqrt()


@dataclass(frozen=True)
class Refresh:
    """When a projection is chosen anew: at the first step and every `every` steps.

    Args:
        energy: also as soon as the basis captures less than this share of what it captured when it was fresh (asked
            every step, which costs one number sent to the host a batch).
        stagger: spread the weights of a group over the period, so that after the first step no single step pays for
            all.
    """

    every: int = 200
    energy: float | None = None
    stagger: bool = False


class Frame(ABC):
    """A projection at one moment, for one batch: the maps into the subspace and back."""

    @abstractmethod
    def down(self, X: Tensor) -> Tensor:
        """(k, n, s) -> (k, n, r)."""

    @abstractmethod
    def up(self, R: Tensor, like: Tensor) -> Tensor:
        """(k, n, r) -> (k, n, s), with the memory layout of `like`."""

    def rest(self, X: Tensor, R: Tensor, share: float = 1.0) -> Tensor:
        """X - share * up(R), newly allocated."""
        return X - self.up(R * share, X)

    @abstractmethod
    def move(self, new: Frame) -> Move:
        """How first (power 1) and second (power 2) moments in this frame are written in the frame `new`."""


class Projection(ABC):
    """Which subspace of the s columns the inner rule sees.

    orthonormal: P^T P = I, so that moments can be rotated between bases. indexed: P is a choice of basis vectors, so
    that rotating is a remap, after which each column of R has its own age. dense: the frame holds P (k, s, r) as a
    tensor, whatever the number of gradients in the `X` that it is asked for with.
    """

    dense: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = True
    indexed: ClassVar[bool] = False

    @abstractmethod
    def width(self, matrix: Matrix) -> int:
        """r, for a weight of this shape."""

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        """State of one weight; none by default."""
        return {}

    def refresh(self, X: Tensor, state: State, seeds: Sequence[int], rows: Rows, first: bool) -> None:
        """Choose the subspace anew for the gradients `X`, in place; `first` when `state` holds no earlier choice.

        Nothing by default: the choice may lie in the seeds alone.
        """
        return None

    @abstractmethod
    def frame(self, state: State, seeds: Sequence[int], X: Tensor) -> Frame:
        """The maps of the current choice, in the dtype and on the device of `X (k, n, s)`."""


class Inner(ABC):
    """How projected gradients become a direction.

    rowwise: rows do not interact, so a tall matrix may be stepped in slices of rows.
    """

    rowwise: ClassVar[bool] = True

    @property
    def decay_first(self) -> bool:
        """Decoupled weight decay comes before the update (torch's AdamW) rather than after it (GaLore's)."""
        return True

    @abstractmethod
    def fields(self, matrix: Matrix) -> dict[str, Field]:
        """State for projected gradients of this shape (`matrix.cols` is r)."""

    @abstractmethod
    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        """Advance the moments with `R (k, n, r)`, the t-th gradient (t from 1); direction N, bias correction c."""

    @abstractmethod
    def transfer(self, state: State, move: Move) -> None:
        """Write the moments in a new frame, in place."""


class Residual(ABC):
    """What becomes of the part of the gradient outside the subspace. corrected: the inner c multiplies it as well."""

    corrected: ClassVar[bool] = False

    @property
    def keeps_gradient(self) -> bool:
        """E is X itself, for any list of gradients (n, s) too."""
        return False

    @abstractmethod
    def term(self, X: Tensor, R: Tensor, N: Tensor, frame: Frame, rows: Rows) -> tuple[Tensor, Scalar]:
        """A matrix E (k, n, s) and a factor f that broadcasts over it: the term is f * E. `X` is not to be changed."""
