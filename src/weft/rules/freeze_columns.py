"""FreezeColumns: the output side of three-factor terms is frozen column by column, early in the run (LaMDA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.rules.schedule import length
from weft.terms import CoreLowRank

__all__ = ["FreezeColumns"]


class FreezeColumns(Rule):
    """After step i of T, the first t(i) = min(r, floor(r i / (eta T))) columns of each trained B (out, r) never change
    again (Azizi et al., 2024, arXiv 2406.12832).

    Frozen columns are put back after the optimizer's step, whatever it did with them: momentum and weight decay move
    what has a gradient of zero. A B that is frozen as a whole is handed to the optimizer without a gradient, and its
    state there is freed. It goes on requiring one: DistributedDataParallel and FSDP2 settle at the start which
    gradients they wait for.

    Args:
        eta: the share of the run after which all of B is frozen; 0 for a B that is never trained.
        steps: T; None for the length of the run.
    """

    works_on = (CoreLowRank,)

    def __init__(self, eta: float, *, steps: int | None = None) -> None:
        if not 0 <= eta <= 1:
            raise WeftError(f"eta is {eta}: the share of the run in which B is trained lies from 0 to 1.")
        self.eta, self.total = eta, steps
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.sides = [term.B for _, term in self.found(CoreLowRank) if term.B.requires_grad]
        self.span = length(self.steps, "Freezing columns") if self.total is None else self.total

    def frozen(self, step: int, rank: int) -> int:
        """t(i) for a B of `rank` columns."""
        # the small number undoes rounding below a whole number, as in 0.3 * 100 = 29.999...
        return min(rank, int(rank * step / (self.eta * self.span) + 1e-9)) if self.eta else rank

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        for B in self.sides:
            count = self.frozen(step - 1, B.shape[1])
            if count == B.shape[1]:
                B.grad = None
                if self.optimizer is not None:
                    self.optimizer.state.pop(B, None)
            elif count:
                columns = _rows_here(B)[:, :count]
                self._kept.append((columns, columns.clone()))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for columns, values in self._kept:
            columns.copy_(values)
        self._kept = []


def _rows_here(B: nn.Parameter) -> Tensor:
    """The part of B that lies on this process, all columns of some rows; the same memory."""
    data = B.detach()
    return data.to_local() if isinstance(data, DTensor) else data
