"""SM3 on scattered entries of a matrix: one accumulator a row and one a column in place of a second moment an entry.

    nu = min(row[i], column[j]) + g^2,   w <- w - lr g / sqrt(nu + eps)
    row[i] <- max(row[i], max_j nu),   column[j] <- max(column[j], max_i nu)      over the active entries (i, j)

Each nu is at least the sum of the squared gradients that its entry has had. The accumulators stay when the entries
change, and tell which row and column have had large gradients (SpIEL-MA).

Sources: SM3 (Anil et al., 2019, arXiv 1901.11150, algorithm SM3-II); on sparse entries, without momentum, Ansell et
al., 2024, arXiv 2401.16405, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.state import restore

__all__ = ["SM3"]


class SM3(torch.optim.Optimizer):
    """SM3 for vectors whose numbers are entries of a matrix, told by `place`.

    Args:
        params: parameters or groups.
        lr, eps: as above.
        weight_decay: decoupled, of the vector.

    Raises WeftError at `step` for a parameter whose places were not told.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self._places: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    def place(self, parameter: nn.Parameter, positions: Tensor, shape: tuple[int, int]) -> None:
        """The numbers of `parameter` (k,) are the entries at flat row-major `positions` (k,) of a matrix (out, in)."""
        positions = positions.long()
        self._places[parameter] = (positions // shape[1], positions % shape[1])
        if not self.state[parameter]:
            zeros = [torch.zeros(n, dtype=torch.float32, device=parameter.device) for n in shape]
            self.state[parameter] = {"row": zeros[0], "column": zeros[1]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore the accumulators exactly; places are told anew."""
        restore(self, state_dict)

    def _step_one(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        if parameter not in self._places:
            raise WeftError("SM3 was not told which entries of a matrix a parameter holds; call place first.")
        (rows, columns), state, grad = self._places[parameter], self.state[parameter], parameter.grad.float()  # type: ignore[union-attr]
        nu = torch.minimum(state["row"][rows], state["column"][columns]) + grad.square()
        state["row"].scatter_reduce_(0, rows, nu, "amax")
        state["column"].scatter_reduce_(0, columns, nu, "amax")
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * grad * (nu + group["eps"]).rsqrt())
