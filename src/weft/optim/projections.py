"""The subspaces: exact, randomised and warm-started SVD, random from a seed, DCT columns, coordinates, whole blocks.

`P (k, s, r)` below is the basis of the projected side of the gradients `X (k, n, s)`. Every `rank` is r itself, or as a
float the density r / s, which then differs from shape to shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.linalg.dct import dct_basis, dct_columns
from weft.linalg.subspace import canonical_signs, cholesky_qr, rayleigh_ritz, subspace_iteration, upcast
from weft.optim.base import Field, Frame, Matrix, Move, Projection, Rows, State
from weft.seeds import mix

__all__ = [
    "DCT",
    "SVD",
    "Blocks",
    "Columns",
    "DenseFrame",
    "Gaussian",
    "Orthogonal",
    "RandomizedSVD",
    "Sparse",
    "Subspace",
    "Whole",
]


@dataclass(frozen=True)
class DenseFrame(Frame):
    """R = X P. `index (k, r)` names the columns of P where they come from one fixed basis."""

    P: Tensor
    index: Tensor | None = None

    def down(self, X: Tensor) -> Tensor:
        return X @ self.P

    def down_each(self, X: Sequence[Tensor]) -> Tensor:
        """`down` of gradients (n, s) that are not stacked."""
        R = self.P.new_empty(len(X), X[0].shape[0], self.P.shape[-1])
        for one, P, out in zip(X, self.P, R, strict=True):
            torch.mm(one, P, out=out)
        return R

    def up(self, R: Tensor, like: Tensor) -> Tensor:
        R = R.to(self.P.dtype)
        return R @ self.P.mT if like.stride(-1) == 1 else (self.P @ R.mT).mT

    def rest(self, X: Tensor, R: Tensor, share: float = 1.0) -> Tensor:
        R = R.to(self.P.dtype)
        if X.stride(-1) == 1:
            return torch.baddbmm(X, R, self.P.mT, alpha=-share)
        return torch.baddbmm(X.mT, self.P, R.mT, alpha=-share).mT

    def move(self, new: Frame) -> Move:
        assert isinstance(new, DenseFrame)
        if self.index is not None and new.index is not None:
            return _remap(self.index, new.index)
        overlap = upcast(self.P).mT @ upcast(new.P)  # (k, r, r')
        return lambda moment, power: moment @ overlap.to(moment.dtype) ** power


@dataclass(frozen=True)
class ColumnFrame(Frame):
    """R = X[..., index]."""

    index: Tensor

    def down(self, X: Tensor) -> Tensor:
        return X.gather(-1, self._spread(X))

    def up(self, R: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=R.dtype).scatter_(-1, self._spread(R), R)

    def move(self, new: Frame) -> Move:
        assert isinstance(new, ColumnFrame)
        return _remap(self.index, new.index)

    def _spread(self, X: Tensor) -> Tensor:
        return self.index.unsqueeze(-2).expand(-1, X.shape[-2], -1)


class WholeFrame(Frame):
    """R = X."""

    def down(self, X: Tensor) -> Tensor:
        return X

    def up(self, R: Tensor, like: Tensor) -> Tensor:
        return R

    def move(self, new: Frame) -> Move:
        return lambda moment, power: moment


def _remap(old: Tensor, new: Tensor) -> Move:
    """Moments follow their basis vector from `old (k, r)` to `new (k, r')`; a newcomer starts at zero."""
    same = new.unsqueeze(-1) == old.unsqueeze(-2)
    kept, source = same.any(-1).unsqueeze(-2), same.int().argmax(-1).unsqueeze(-2)
    return lambda moment, power: moment.gather(-1, source.expand(-1, moment.shape[-2], -1)) * kept


@dataclass(frozen=True)
class _Ranked(Projection):
    """A projection onto `rank` directions."""

    rank: int | float
    dense: ClassVar[bool] = True

    def width(self, matrix: Matrix) -> int:
        return self.size(matrix.cols)

    def size(self, cols: int) -> int:
        return self.rank if isinstance(self.rank, int) else max(round(self.rank * cols), self.rank > 0)


class _Stored(_Ranked):
    """A projection that stores an orthonormal basis `P (s, r)` a weight."""

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"basis": Field((matrix.cols, self.width(matrix)), matrix.dtype)}

    def frame(self, state: State, seeds: Sequence[int], X: Tensor) -> Frame:
        return DenseFrame(state["basis"].to(X.dtype))

    def refresh(self, X: Tensor, state: State, seeds: Sequence[int], rows: Rows, first: bool) -> None:
        old = None if first else upcast(state["basis"])
        state["basis"].copy_(canonical_signs(self._find(upcast(X), old, seeds, rows), old))

    @abstractmethod
    def _find(self, X: Tensor, old: Tensor | None, seeds: Sequence[int], rows: Rows) -> Tensor:
        """The basis for `X` in fp32 or fp64, any signs; `old` is the previous one."""


@dataclass(frozen=True)
class SVD(_Stored):
    """The top-r singular vectors, exactly (GaLore). Where rows are sharded: eigenvectors of the s x s Gram matrix in
    fp64, so that only that matrix is summed."""

    def _find(self, X: Tensor, old: Tensor | None, seeds: Sequence[int], rows: Rows) -> Tensor:
        r = self.size(X.shape[-1])
        if rows.group is None and X.shape[-2] >= r:
            Vh: Tensor = torch.linalg.svd(X, full_matrices=False).Vh
            return Vh[..., :r, :].mT
        wide = X.double()
        vectors: Tensor = torch.linalg.eigh(rows.sum(wide.mT @ wide)).eigenvectors
        return vectors.flip(-1)[..., :r].to(X.dtype)


@dataclass(frozen=True)
class RandomizedSVD(_Stored):
    """The top-r singular vectors from `rank + oversample` random directions, `power` block power rounds,
    Rayleigh-Ritz."""

    oversample: int = 8
    power: int = 2

    def _find(self, X: Tensor, old: Tensor | None, seeds: Sequence[int], rows: Rows) -> Tensor:
        r = self.size(X.shape[-1])
        start = cholesky_qr(_draw(seeds, X, min(r + self.oversample, X.shape[-1]), _normal))
        return rayleigh_ritz(X, subspace_iteration(X, start, self.power, rows.sum), r, rows.sum)[0]


@dataclass(frozen=True)
class Subspace(_Stored):
    """Warm-started block power iteration: `steps` rounds from the previous basis, and a randomised SVD at the first
    step.

    At each later refresh the cost is 4 n s r multiply-adds a round and one s x r sum over processes.

    Source: PowerSGD (Vogels et al., 2019, arXiv 1905.13727) for gradients that are sent; LDAdam (Robert et al., 2024,
    arXiv 2410.16103) for an optimizer's subspace.
    """

    steps: int = 2

    def _find(self, X: Tensor, old: Tensor | None, seeds: Sequence[int], rows: Rows) -> Tensor:
        if old is None:
            return RandomizedSVD(self.rank)._find(X, None, seeds, rows)
        return subspace_iteration(X, old, self.steps, rows.sum)


@dataclass(frozen=True)
class Orthogonal(_Stored):
    """A random orthonormal basis, uniform over all of them, whatever the gradient (FRUGAL's "random")."""

    def _find(self, X: Tensor, old: Tensor | None, seeds: Sequence[int], rows: Rows) -> Tensor:
        return cholesky_qr(_draw(seeds, X, self.size(X.shape[-1]), _normal))


Draw = Callable[[Tensor, torch.Generator], None]


def _normal(out: Tensor, generator: torch.Generator) -> None:
    out.normal_(generator=generator)


def _ternary(out: Tensor, generator: torch.Generator) -> None:
    share = out.shape[0] ** -0.5
    out.uniform_(-1, 1, generator=generator)
    out.copy_((out.abs() < share) * out.sign() * (share * out.shape[1]) ** -0.5)


def _draw(seeds: Sequence[int], X: Tensor, width: int, draw: Draw) -> Tensor:
    """A random (s, width) matrix for each weight, in fp32, from its own seed alone: any batch or order draws the
    same."""
    out = torch.empty(len(seeds), X.shape[-1], width, device=X.device)
    generator = torch.Generator(X.device)
    for row, seed in zip(out, seeds, strict=True):
        draw(row, generator.manual_seed(seed))
    return out.to(upcast(X[:0]).dtype)


@dataclass(frozen=True)
class Gaussian(_Ranked):
    """P with entries N(0, 1/r), drawn again from a seed at every use and never stored (APOLLO): E ||x P||^2 =
    ||x||^2."""

    orthonormal: ClassVar[bool] = False

    def frame(self, state: State, seeds: Sequence[int], X: Tensor) -> Frame:
        r = self.size(X.shape[-1])
        return DenseFrame(_draw(seeds, X, r, _normal).mul_(max(r, 1) ** -0.5).to(X.dtype))


@dataclass(frozen=True)
class Sparse(_Ranked):
    """Very sparse random P (Li, Hastie & Church 2006): entries 0 but for a share 1/sqrt(s), there +-s^(1/4) /
    sqrt(r)."""

    orthonormal: ClassVar[bool] = False

    def frame(self, state: State, seeds: Sequence[int], X: Tensor) -> Frame:
        return DenseFrame(_draw(seeds, X, self.size(X.shape[-1]), _ternary).to(X.dtype))


@dataclass(frozen=True)
class DCT(_Ranked):
    """The r columns of the discrete cosine transform that align best with the gradient; only their indices are stored.

    A column is scored by the l1 or l2 norm of its coefficients (l2 is the best choice of columns there is). Indices are
    kept sorted (Modoranu et al. 2025, arXiv 2505.17967).
    """

    score: Literal["l1", "l2"] = "l1"
    indexed: ClassVar[bool] = True

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"index": Field((self.width(matrix),), torch.int64)}

    def refresh(self, X: Tensor, state: State, seeds: Sequence[int], rows: Rows, first: bool) -> None:
        coefficients = X @ dct_basis(X.shape[-1], X.dtype, X.device)
        mass = coefficients.abs() if self.score == "l1" else coefficients.square()
        total = rows.sum(mass.sum(dim=-2, dtype=torch.promote_types(X.dtype, torch.float32)))
        state["index"].copy_(total.topk(state["index"].shape[-1], dim=-1).indices.sort(dim=-1).values)

    def frame(self, state: State, seeds: Sequence[int], X: Tensor) -> Frame:
        return DenseFrame(dct_columns(state["index"], X.shape[-1], X.dtype), state["index"])


@dataclass(frozen=True)
class Columns(_Ranked):
    """Coordinates of the projected side drawn at random (FRUGAL's columns; rows with side="left")."""

    dense: ClassVar[bool] = False
    indexed: ClassVar[bool] = True

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"index": Field((self.width(matrix),), torch.int64)}

    def refresh(self, X: Tensor, state: State, seeds: Sequence[int], rows: Rows, first: bool) -> None:
        for index, seed in zip(state["index"], seeds, strict=True):
            order = torch.randperm(X.shape[-1], generator=torch.Generator().manual_seed(seed))
            index.copy_(order[: index.shape[0]].sort().values)

    def frame(self, state: State, seeds: Sequence[int], X: Tensor) -> Frame:
        return ColumnFrame(state["index"])


@dataclass(frozen=True)
class Whole(Projection):
    """The identity, or with `active=False` the empty subspace: everything, or nothing, gets the inner rule."""

    active: bool = True

    def width(self, matrix: Matrix) -> int:
        return matrix.cols if self.active else 0

    def frame(self, state: State, seeds: Sequence[int], X: Tensor) -> Frame:
        return WholeFrame() if self.active else ColumnFrame(torch.empty(len(X), 0, dtype=torch.int64, device=X.device))


@dataclass(frozen=True)
class Blocks:
    """FRUGAL's blocks: in each period `round(density * count)` of a group's matrices get the inner rule whole, the
    others only the residual. Moments exist for the active ones alone and start anew with each period.

    order: "random", or a window that moves through the group "ascending" or "descending", or "mirror": one that moves
    from both ends at once, for an even number of active matrices.
    """

    density: float
    order: Literal["random", "ascending", "descending", "mirror"] = "random"

    def chosen(self, index: int, count: int, period: int, seed: int) -> Whole:
        """What the index-th of `count` matrices gets in a period."""
        active = round(self.density * count)
        if self.order == "mirror":
            if active % 2:
                raise WeftError(f"mirror takes pairs of matrices, and {active} of {count} are odd; change the density.")
            pair = min(index, count - 1 - index)
            return Whole(2 * pair + 1 != count and (pair - period * active // 2) % (count // 2) < active // 2)
        if self.order == "random":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, period))).tolist()
            place = order.index(index)
        else:
            step = index if self.order == "ascending" else count - 1 - index
            place = (step - period * active) % count
        return Whole(place < active)
