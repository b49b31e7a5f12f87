"""Columns of a weight settled one after another, each one's error taken up by those after it (Frantar and Alistarh,
2022, arXiv 2208.11580, in the form of Frantar et al., 2022, arXiv 2210.17323).

    least tr(D H D^T),   D = W - W' (out, in),   H = E[x x^T] (in, in)
    H + damping * mean(diag H) * I  ->  its inverse = U^T U, U upper triangular
    for j = 1, 2, ...:   e_j = (w_j - w'_j) / U_jj,   w_k <- w_k - e_j U_jk  for k > j
    with the damped H:   tr(D H D^T) = sum of all e^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from weft.errors import WeftError

__all__ = ["Columns", "columns", "feedback", "settle"]


class Columns(NamedTuple):
    """The order of columns, and how the error of each is spread over those after it."""

    order: list[int]
    root: Tensor  # U (in, in) upper triangular, of the inverse of H in that order
    dead: Tensor  # (in,) bool: columns without input
    by_input: bool  # whether the order is another than the layer's

    def begin(self, W: Tensor) -> Tensor:
        """W (out, in) as (in, out) in this order, a copy: a column lies in one piece; dead ones are zero."""
        return W.masked_fill(self.dead, 0)[:, self.order].mT.contiguous()

    def back(self, rows: Tensor) -> Tensor:
        """(in, out) in this order as (out, in) in the layer's."""
        answer = torch.empty_like(rows)
        answer[self.order] = rows
        return answer.mT


def columns(H: Tensor, *, damping: float = 0.01, by_input: bool = False) -> Columns:
    """How columns with inputs of second moment H (in, in) are settled; `by_input` begins with the largest inputs.

    Raises:
        WeftError: H leaves directions out, and the damping does not fill them.
    """
    dead = H.diagonal() == 0
    H = H + torch.diag(dead.to(H.dtype))
    H = H + torch.eye(len(H), dtype=H.dtype, device=H.device) * (damping * H.diagonal().mean())
    order = torch.arange(len(H), device=H.device)
    if by_input:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order]))
        root = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise WeftError(
            f"A moment of {len(H)} x {len(H)} cannot be inverted with a damping of {damping:g}: give a larger one, "
            "such as 0.01, or more calibration text."
        ) from error
    return Columns(order.tolist(), root, dead, by_input)


def feedback(U: Tensor) -> Tensor:
    """The share of each column's error that those after it take up (in, in), one on the diagonal; U as in `Columns`."""
    return U / U.diagonal().unsqueeze(1)


def settle(rest: Tensor, U: Tensor, blocks: Iterable[tuple[int, int]], settled: Callable[[int], Tensor]) -> None:
    """Walk over `rest` (in, out), whose row j is then what column j was when its turn came.

    Args:
        rest: changed in place; what is settled is left as it was found.
        U: (in, in), in the dtype of `rest`.
        blocks: ranges of columns, one after another: errors reach the columns after a block when it ends, which
            changes nothing but the time.
        settled: j -> w'_j (out,); it reads `rest`, up to date from j to the end of the block, and after the block when
            j begins one.
    """
    shares = feedback(U)
    for start, stop in blocks:
        errors: list[Tensor] = []
        for j in range(start, stop):
            errors.append(rest[j] - settled(j))
            rest[j + 1 : stop].addr_(shares[j, j + 1 : stop], errors[-1], alpha=-1)
        rest[stop:].addmm_(shares[start:stop, stop:].mT, torch.stack(errors), alpha=-1)
