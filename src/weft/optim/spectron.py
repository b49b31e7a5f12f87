"""Spectron: orthogonal steps of two factors, so short that their product moves by no more than is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from weft.optim.muon import beside_adamw, tensors
from weft.optim.parameters import parameter_groups
from weft.optim.several import Several

__all__ = ["Bounded", "norm_bound", "orthogonal", "products", "spectron"]


def orthogonal(M: Tensor, iterations: int = 5) -> Tensor:
    """Near the polar factor U V of M = U diag(s) V, every singular value at most 1, those of zero zero: Newton-Schulz
    steps as in Muon, in fp32, and two cubic ones, which never pass 1.
    """
    flipped = M.shape[0] > M.shape[1]
    X = (M.mT if flipped else M).to(torch.promote_types(M.dtype, torch.float32))
    X = X / X.norm().clamp(min=torch.finfo(X.dtype).tiny)
    for _ in range(iterations):
        G = X @ X.mT
        X = 3.4445 * X + (-4.7750 * G + 2.0315 * G @ G) @ X
    for _ in range(2):
        X = 1.5 * X - 0.5 * (X @ X.mT) @ X
    return X.mT if flipped else X


def norm_bound(M: Tensor) -> Tensor:
    """A number no less than ||M||_2, and at most r^(1/64) times it, r the smaller side: ||(M M^T)^16||_F^(1/32)."""
    X = M.mT if M.shape[0] > M.shape[1] else M
    G = (X @ X.mT).to(torch.promote_types(M.dtype, torch.float32))
    size = G.norm().clamp(min=torch.finfo(G.dtype).tiny)
    power, G = size.log(), G / size
    for _ in range(4):  # ||G^2|| of G of norm 1, its own norm taken out each time
        G = G @ G
        size = G.norm().clamp(min=torch.finfo(G.dtype).tiny)
        power, G = 2 * power + size.log(), G / size
    return (power / 32).exp()


class Bounded(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices and pairs of factors; see `spectron`.

    Args:
        groups: with "params", matrices, and "products", which of them belong together: places [B, A] or [W] among them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every product. A closure is evaluated first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for places in group["products"]:
                self._step(group, [group["params"][i] for i in places])
        return loss

    def _step(self, group: dict[str, Any], factors: Sequence[Tensor]) -> None:
        moved = [(p, self._direction(group, p)) for p in factors if p.grad is not None]
        out, inn = factors[0].shape[0], factors[-1].shape[1]
        size = 0.2 * max(out, inn) ** 0.5 if group["adjust"] == "match_rms_adamw" else 1.0
        length: Any = group["lr"] * size
        if len(factors) == 2:
            B, A = map(_whole, factors)
            length = (length / (norm_bound(B) + norm_bound(A) + 1)).clamp(max=1.0)
        for p, direction in moved:
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(_like((direction * length).to(p.dtype), p))

    def _direction(self, group: dict[str, Any], p: Tensor) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        return orthogonal(_whole(p.grad.lerp(momentum, group["momentum"])), group["iterations"])


def products(matrices: Sequence[tuple[str, Tensor]]) -> list[list[int]]:
    """Which of these belong together: [B, A] for X.B (out, r) and X.A (r, in) of one term, [W] for any other."""
    places = {name: i for i, (name, _) in enumerate(matrices)}
    found = []
    for name, i in places.items():
        stem, _, own = name.rpartition(".")
        other = places.get(f"{stem}.{'A' if own == 'B' else 'B'}") if own in ("A", "B") else None
        B, A = (i, other) if own == "B" else (other, i)
        if B is None or A is None or matrices[B][1].shape[1] != matrices[A][1].shape[0]:
            found.append([i])
        elif own == "B":
            found.append([B, A])
    return found


def spectron(
    model: nn.Module | Iterable[dict[str, Any]],
    lr: float = 1e-3,
    *,
    momentum: float = 0.95,
    iterations: int = 5,
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
) -> Several:
    """Spectron: orthogonal steps of both factors of a product, bounded by their norms; AdamW for what is no matrix.

        M <- mu M + (1 - mu) G,   O = NS(mu M + (1 - mu) G)   of B and of A
        rho = eta / (||A||_2 + ||B||_2 + 1),   B <- B - rho O_B,   A <- A - rho O_A:   then ||change of B A||_2 <= eta

    eta is lr times 0.2 sqrt(max(out, in)), Muon's size of a step, or with "original" lr. A matrix without a partner
    steps by eta O, which is Muon. Explicit groups with a "rank" (any) hold matrices, each for itself.

    Args:
        weight_decay: decoupled, on the matrices alone; beyond the bound.
        seed: of nothing, as it draws no numbers.

    Source: Janson et al., 2026, arXiv 2602.12429.
    Deviations: written from the abstract and summaries of it, no code was found. The norms are bounded from above by a
    power of the Gram matrix, within r^(1/64), where the paper estimates them by power iteration; two cubic steps after
    Muon's keep singular values at or below 1, so that the bound holds as it stands. Nesterov's form of the momentum.
    """
    matrices, others = parameter_groups(model)
    for group in matrices:
        pairs = [entry if isinstance(entry, tuple) else ("", entry) for entry in group["params"]]
        group["products"] = products(pairs) if isinstance(model, nn.Module) else [[i] for i in range(len(pairs))]
    own = Bounded(
        tensors(matrices), lr=lr, momentum=momentum, iterations=iterations, adjust=adjust, weight_decay=weight_decay
    )
    return beside_adamw(own, others, lr, betas, eps)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, reference: Tensor) -> Tensor:
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
