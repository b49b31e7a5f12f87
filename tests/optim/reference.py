"""The presets written out plainly: one matrix, one step, one line a formula, in the layout of the papers.

Each function takes a weight W (out, in), its gradients in order, and hyperparameters, and returns the final weight.
They share no code with weft. `basis(G, r, side, old, t)` chooses the projection: `svd_raw` keeps LAPACK's own signs, as
the released packages do; `svd_signed` turns each column to its predecessor (first: largest entry positive), as weft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Basis = Callable[[Tensor, int, str, Tensor | None, int], Tensor]


def side_of(G: Tensor) -> str:
    return "right" if G.shape[0] >= G.shape[1] else "left"


def svd_raw(G: Tensor, r: int, side: str, old: Tensor | None, t: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Vh[:r].T if side == "right" else U[:, :r]


def svd_signed(G: Tensor, r: int, side: str, old: Tensor | None, t: int) -> Tensor:
    P = svd_raw(G, r, side, old, t).clone()
    for c in range(r):
        guide = P[:, c].abs().argmax() if old is None else None
        towards = P[guide, c] if guide is not None else P[:, c] @ old[:, c]
        if towards < 0:
            P[:, c] = -P[:, c]
    return P


def down(G: Tensor, P: Tensor, side: str) -> Tensor:
    return G @ P if side == "right" else P.T @ G


def up(R: Tensor, P: Tensor, side: str) -> Tensor:
    return R @ P.T if side == "right" else P @ R


def long_norm(X: Tensor, side: str) -> Tensor:
    """Norms along the projected side, one for each index of the long side, ready to broadcast."""
    return X.norm(dim=1, keepdim=True) if side == "right" else X.norm(dim=0, keepdim=True)


def adam_whole(
    W: Tensor, grads: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, wd: float = 0.0
) -> Tensor:
    """The old Hugging Face AdamW that GaLore gives to all other parameters."""
    W, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for t, G in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * G
        v = betas[1] * v + (1 - betas[1]) * G * G
        W = W - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (v.sqrt() + eps)
        W = W - lr * wd * W
    return W


def galore(
    W: Tensor,
    grads: Sequence[Tensor],
    *,
    rank: int,
    lr: float,
    refresh: int,
    scale: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    wd: float = 0.0,
    basis: Basis = svd_signed,
) -> Tensor:
    W, side, P = W.clone(), side_of(W), None
    for t, G in enumerate(grads):
        if t % refresh == 0:
            P = basis(G, rank, side, P, t)
        R = down(G, P, side)
        if t == 0:
            m, v = torch.zeros_like(R), torch.zeros_like(R)
        m = betas[0] * m + (1 - betas[0]) * R
        v = betas[1] * v + (1 - betas[1]) * R * R
        N = m / (v.sqrt() + eps)
        step = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        W = W - step * scale * up(N, P, side)
        W = W - lr * wd * W
    return W


def fira(
    W: Tensor,
    grads: Sequence[Tensor],
    *,
    rank: int,
    lr: float,
    refresh: int,
    scale: float,
    residual: str = "official",
    gamma: float = 1.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    wd: float = 0.0,
    basis: Basis = svd_signed,
) -> Tensor:
    W, side, P, q = W.clone(), side_of(W), None, 0.0
    for t, G in enumerate(grads):
        if t % refresh == 0:
            P = basis(G, rank, side, P, t)
        R = down(G, P, side)
        if t == 0:
            m, v = torch.zeros_like(R), torch.zeros_like(R)
        m = betas[0] * m + (1 - betas[0]) * R
        v = betas[1] * v + (1 - betas[1]) * R * R
        N = m / (v.sqrt() + eps)
        phi = long_norm(N, side) / (long_norm(R, side) + 1e-8)
        S = phi * (G - (scale if residual == "official" else 1.0) * up(R, P, side))
        if q > 0:
            S = S / (max(S.norm().item() / (q + 1e-8), gamma) / gamma)
        q = S.norm().item()
        step = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        W = W - step * (scale * up(N, P, side) + S)
        W = W - lr * wd * W
    return W


def apollo(
    W: Tensor,
    grads: Sequence[Tensor],
    *,
    rank: int,
    lr: float,
    refresh: int,
    scale: float,
    basis: Basis,
    granularity: str = "channel",
    gamma: float = 1.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    wd: float = 0.0,
) -> Tensor:
    W, side, P, q = W.clone(), side_of(W), None, 0.0
    for t, G in enumerate(grads):
        if t % refresh == 0:
            P = basis(G, rank, side, P, t)
        R = down(G, P, side)
        if t == 0:
            m, v = torch.zeros_like(R), torch.zeros_like(R)
        m = betas[0] * m + (1 - betas[0]) * R
        v = betas[1] * v + (1 - betas[1]) * R * R
        N = m / (v.sqrt() + eps)
        if granularity == "channel":
            U = long_norm(N, side) / (long_norm(R, side) + 1e-8) * G
        else:
            U = N.norm() / (R.norm() + 1e-8) * G
        if q > 0:
            U = U / (max(U.norm().item() / (q + 1e-8), gamma) / gamma)
        q = U.norm().item()
        step = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        W = W - step * math.sqrt(scale) * U
        W = W - lr * wd * W
    return W


def frugal(
    W: Tensor,
    grads: Sequence[Tensor],
    *,
    columns: Callable[[int], Tensor] | None,
    rank: int,
    lr: float,
    refresh: int,
    scale: float,
    residual_scale: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Tensor:
    """With `columns(period)` a selection of indices of the short side; without it, the SVD subspace."""
    W, side, P = W.clone(), side_of(W), None
    for t, G in enumerate(grads):
        if t % refresh == 0:
            if columns is None:
                P = svd_signed(G, rank, side, P, t)
            else:
                k = min(G.shape)
                P = torch.eye(k, dtype=G.dtype)[:, columns(t // refresh)]
            age = 0
        A = down(G, P, side)
        if age == 0:
            m, v = torch.zeros_like(A), torch.zeros_like(A)
        age += 1
        m = betas[0] * m + (1 - betas[0]) * A
        v = betas[1] * v + (1 - betas[1]) * A * A
        update = (m / (1 - betas[0] ** age)) / ((v / (1 - betas[1] ** age)).sqrt() + eps)
        E = G - up(A, P, side)
        W = W * (1 - lr * wd)
        W = W - lr * scale * up(update, P, side)
        W = W - lr * scale * residual_scale * torch.sign(E)
    return W


def dct_matrix(k: int) -> Tensor:
    """C (k, k), written with loops: row i is the i-th DCT-II vector."""
    C = torch.empty(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(k):
            C[i, j] = math.sqrt((1 if i == 0 else 2) / k) * math.cos(math.pi * i * (2 * j + 1) / (2 * k))
    return C


def dct_adamw(
    W: Tensor,
    grads: Sequence[Tensor],
    *,
    rank: int,
    lr: float,
    refresh: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Tensor:
    """Moments and ages are kept in full size, one slot a frequency: what is not chosen is forgotten."""
    W, side = W.clone(), side_of(W)
    k, long = min(W.shape), max(W.shape)
    C = dct_matrix(k)
    m, v = torch.zeros(long, k, dtype=W.dtype), torch.zeros(long, k, dtype=W.dtype)
    age, chosen = [0] * k, []
    for t, G in enumerate(grads):
        S = (G if side == "right" else G.T) @ C.T
        if t % refresh == 0:
            chosen = sorted(range(k), key=lambda j: -S[:, j].abs().sum().item())[:rank]
            for j in range(k):
                if j not in chosen:
                    m[:, j], v[:, j], age[j] = 0, 0, 0
        U = torch.zeros_like(S)
        for j in chosen:
            age[j] += 1
            m[:, j] = betas[0] * m[:, j] + (1 - betas[0]) * S[:, j]
            v[:, j] = betas[1] * v[:, j] + (1 - betas[1]) * S[:, j] ** 2
            m_hat, v_hat = m[:, j] / (1 - betas[0] ** age[j]), v[:, j] / (1 - betas[1] ** age[j])
            U[:, j] = m_hat / (v_hat.sqrt() + eps)
        back = U @ C
        W = W * (1 - lr * wd) - lr * (back if side == "right" else back.T)
    return W


def weight_norm_gradients(V: Tensor, g: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """(dg, dV) of W = g V / ||V|| by rows, for D = dL/dW: the formulas of the card."""
    n = V.norm(dim=1, keepdim=True)
    Vh = V / n
    dg = (D * Vh).sum(dim=1, keepdim=True)
    return dg, (g / n) * (D - dg * Vh)
