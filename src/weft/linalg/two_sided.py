"""The numbers of a weight settled one after another, each one's error taken up by those after it in its row and in its
column (Tseng et al., 2025, arXiv 2505.22988; nearest plane, Babai, 1986, in a Kronecker product).

    least tr(D^T G D X),   D = W - W' (out, in),   G (out, out),   X (in, in)
    G^-1 = A^T diag(a)^2 A,   X^-1 = B^T diag(b)^2 B,   A and B upper triangular with ones on the diagonal
    number by number:   e_ij = z_ij - w'_ij,   z = W - (A^T E B - E),   so that z_ij has errors before (i, j) only
    then  D = A^T E B,   tr(D^T G D X) = sum of (e_ij / (a_i b_j))^2

With G = 1 this is `weft.linalg.column_errors`. Tiles on one anti-diagonal wait for nothing of each other, nor do the
numbers on one of a tile: out + in steps of a few tiles, whatever the size, and products of matrices between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from weft.linalg.grids import Grids, Levels

__all__ = ["Settled", "settle"]

G = TypeVar("G", Grids, Levels)

_TILE = 32
"""Rows and columns of a tile: errors within it are spread number by number, beyond it by products."""


class Settled(NamedTuple, Generic[G]):
    """What the numbers of a matrix have become."""

    codes: Tensor  # (k, out, in) whole numbers
    grids: G  # (k, out, groups) each


def settle(W: Tensor, A: Tensor, B: Tensor, group: int, grids: Callable[[Tensor], G]) -> Settled[G]:
    """The nearest numbers on grids that are chosen when their groups are reached.

    Args:
        W: (k, out, in), k matrices that are settled side by side.
        A: (out, out), the feedback of G (`weft.linalg.column_errors`); B: (in, in), that of X; in the dtype of W.
        group: inputs of a row that share a grid.
        grids: numbers (k, groups, rows, group), as they are when their turn comes -> grids (k, groups, rows); groups
            that are too short are filled with zeros.
    """
    walk: _Walk[G] = _Walk(W, A, B, group, grids)
    for step in range(walk.height + walk.width - 1):
        tiles = [(i, step - i) for i in range(max(0, step - walk.width + 1), min(walk.height, step + 1))]
        walk.choose_grids(tiles)
        walk.spread(tiles, *_settled(*walk.gathered(tiles)))
    return walk.answer()


class _Side(NamedTuple):
    """Rows or columns, every group filled up to whole tiles."""

    at: Tensor  # where each of them lies
    places: int

    @classmethod
    def of(cls, count: int, group: int, tile: int, device: torch.device) -> _Side:
        """That of `count` rows or columns."""
        filled, at = -(-group // tile) * tile, torch.arange(count, device=device)
        return cls(at // group * filled + at % group, -(-count // group) * filled)

    def feedback(self, of: Tensor) -> Tensor:
        """One (n, n) in its places; what fills up has no share in anything."""
        answer = torch.eye(self.places, dtype=of.dtype, device=of.device)
        answer[self.at.unsqueeze(1), self.at] = of
        return answer


class _Walk(Generic[G]):
    """The numbers on their way: `rest` is W less what rows before have spread, `sums` is E B so far."""

    def __init__(self, W: Tensor, A: Tensor, B: Tensor, group: int, grids: Callable[[Tensor], G]) -> None:
        self.grids: Callable[[Tensor], G] = grids
        self.group, self.tile = group, min(_TILE, group)
        self.rows = _Side.of(W.shape[1], self.tile, self.tile, W.device)
        self.columns = _Side.of(W.shape[2], group, self.tile, W.device)
        self.A, self.B = self.rows.feedback(A), self.columns.feedback(B)
        self.height, self.width = self.rows.places // self.tile, self.columns.places // self.tile
        self.per_group = -(-group // self.tile)  # tiles
        self.rest = W.new_zeros(len(W), self.rows.places, self.columns.places)
        self.rest[:, self.rows.at.unsqueeze(1), self.columns.at] = W
        self.sums, self.codes = torch.zeros_like(self.rest), torch.zeros_like(self.rest)
        self.given = W.new_zeros(self.columns.places).index_fill(0, self.columns.at, 1.0)
        self.kind: G | None = None
        self.found = W.new_zeros(0)

    def choose_grids(self, tiles: list[tuple[int, int]]) -> None:
        """Those of the groups that begin with one of these tiles."""
        new = [(i, j) for i, j in tiles if j % self.per_group == 0]
        if new:
            found = self.grids(torch.stack([self.now(i, j)[..., : self.group] for i, j in new], 1))
            if self.kind is None:
                groups = self.width // self.per_group
                self.kind = found
                self.found = found.scale.new_zeros(len(found.fields), len(self.rest), self.height, groups, self.tile)
            self.found[:, :, [i for i, _ in new], [j // self.per_group for _, j in new]] = found.fields

    def now(self, i: int, j: int) -> Tensor:
        """The numbers (k, tile, group) of the group that begins with a tile, with all errors so far taken up: also
        those that will come by way of tiles above it and to the right, which are not settled yet. What fills up a
        group is zero, whatever it was rounded to above.
        """
        rows, parts = self._range(i), []
        for right in range(self.per_group):
            columns, above = self._range(j + right), slice(max(0, i - right) * self.tile, rows.stop)
            sums = self.A[above, rows].mT @ self.sums[:, above, columns]
            parts.append((self.rest[:, rows, columns] - sums) * self.given[columns])
        return torch.cat(parts, 2)

    def gathered(self, tiles: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor, G]:
        """Of k x tiles: what is left and the sums (n, tile, tile), both feedbacks, and the grids (n, tile)."""
        assert self.kind is not None
        i, j = (list(of) for of in zip(*tiles, strict=True))
        rest, sums = (self._cut(t)[:, i, :, j].flatten(0, 1) for t in (self.rest, self.sums))
        A, B = (torch.stack([t[at, at] for at in map(self._range, of)]) for t, of in ((self.A, i), (self.B, j)))
        k, groups = len(self.rest), [at // self.per_group for at in j]
        grids = self.found[:, :, i, groups].transpose(1, 2).flatten(1, 2)
        return rest, sums, A.repeat_interleave(k, 0), B.repeat_interleave(k, 0), self.kind.like(grids)

    def spread(self, tiles: list[tuple[int, int]], codes: Tensor, errors: Tensor, sums: Tensor) -> None:
        """Keep the codes of tiles (n, tile, tile), and let the columns and rows after them take up the errors."""
        each = (t.view(len(tiles), -1, *t.shape[1:]) for t in (codes, errors, sums))
        for (i, j), code, error, sum in zip(tiles, *each, strict=True):
            rows, columns = self._range(i), self._range(j)
            self.codes[:, rows, columns] = code
            self.sums[:, rows, columns.stop :] += error @ self.B[columns, columns.stop :]
            self.rest[:, rows.stop :, columns] -= self.A[rows, rows.stop :].mT @ sum

    def answer(self) -> Settled[G]:
        """The codes and grids of what was given."""
        assert self.kind is not None
        rows = self.found.permute(0, 1, 2, 4, 3).flatten(2, 3)  # (fields, k, out, groups)
        return Settled(
            self.codes[:, self.rows.at.unsqueeze(1), self.columns.at], self.kind.like(rows[:, :, self.rows.at])
        )

    def _range(self, at: int) -> slice:
        return slice(at * self.tile, (at + 1) * self.tile)

    def _cut(self, whole: Tensor) -> Tensor:
        return whole.view(len(whole), self.height, self.tile, self.width, self.tile)


def _settled(rest: Tensor, sums: Tensor, A: Tensor, B: Tensor, grids: G) -> tuple[Tensor, Tensor, Tensor]:
    """The codes and errors of tiles (n, t, t), and the sums with these errors; number by number on each anti-diagonal.

    With columns in reverse order an anti-diagonal is a diagonal, whose rows are a range, as are its columns.
    """
    t, fields = rest.shape[1], grids.fields
    rest, sums, B = rest.flip(2).mT.contiguous(), sums.flip(2).contiguous(), B.flip(1, 2).contiguous()
    codes, errors = torch.empty_like(sums), torch.empty_like(sums)
    for step in range(2 * t - 1):
        rows, off = slice(max(0, step - t + 1), min(t, step + 1)), t - 1 - step
        columns = slice(rows.start + off, rows.stop + off)
        target, grid = rest.diagonal(-off, 1, 2) - sums.diagonal(off, 1, 2), grids.like(fields[:, :, rows])
        code = grid.nearest(target)
        error = target - grid.numbers(code)
        codes.diagonal(off, 1, 2).copy_(code)
        errors.diagonal(off, 1, 2).copy_(error)
        sums[:, rows].addcmul_(error.unsqueeze(2), B[:, columns])
        rest[:, columns].addcmul_(sums.diagonal(off, 1, 2).unsqueeze(2), A[:, rows], value=-1)
    return codes.flip(2), errors.flip(2), sums.flip(2)
