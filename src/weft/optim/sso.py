"""SSO: ask for the loss and its slope once, then take several steps on a quadratic around the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.closure import steady

__all__ = ["SSO"]


class SSO(torch.optim.Optimizer):
    """Steps on a surrogate in the space of the model's outputs z (any shape), for losses that cost more than the model:

        G = dl/dz at z_t, once;   h(w) = <G, z(w) - z_t> + |z(w) - z_t|^2 / (2 eta)
        iterations times:   w <- w - lr dh/dw,   dh/dw = J(w)^T (G + (z(w) - z_t) / eta)

    With one iteration it is gradient descent at `lr`, whatever eta. Dropout rests within a step.

    Args:
        model: or parameter groups; of a model, all that requires a gradient.
        lr: of the inner steps.
        eta: how far outputs may move: 1 / L for a loss of smoothness L in z. A sum of squares has eta 0.5, a sum of
            cross-entropies 2 at least; a mean over n of them n times as much.
        iterations: of inner steps.

    Source: Lavington et al., 2023, arXiv 2302.02607.
    Deviations: the Euclidean divergence and a constant step of plain gradient descent inside; no line search, no
    schedule of eta.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float = 1e-2,
        *,
        eta: float = 1.0,
        iterations: int = 5,
        seed: int = 0,
    ) -> None:
        if eta <= 0 or iterations < 1:
            raise WeftError(f"eta is {eta} and iterations {iterations}: give an eta above 0, and 1 iteration or more.")
        self.model = model if isinstance(model, nn.Module) else None
        given: Any = model if self.model is None else [p for p in self.model.parameters() if p.requires_grad]
        super().__init__(given, {"lr": lr, "eta": eta, "iterations": iterations})

    @torch.no_grad()
    def step(self, outputs: Callable[[], Tensor], oracle: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """One outer step; returns the loss before it.

        Args:
            outputs: gives z of one batch, differentiable; called `iterations` times.
            oracle: z -> the loss, a scalar; called and differentiated once.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        eta, iterations = (self.param_groups[0][name] for name in ("eta", "iterations"))
        with steady(self.model, parameters) as again, torch.enable_grad():
            first = slope = loss = None
            for _ in range(iterations):
                again()
                z = outputs()
                if slope is None:
                    first = z.detach().clone().requires_grad_(True)
                    loss = oracle(first)
                    (slope,) = torch.autograd.grad(loss, first)
                moved = (z.detach().float() - first.detach().float()) / eta  # type: ignore[union-attr]
                grads = torch.autograd.grad(z, parameters, (slope.float() + moved).to(z.dtype), allow_unused=True)
                self._descend(parameters, grads)
        assert loss is not None
        return loss.detach()

    @torch.no_grad()
    def _descend(self, parameters: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        for p, gradient, rate in zip(parameters, grads, rates, strict=True):
            if gradient is not None:
                p.sub_(gradient, alpha=rate)
