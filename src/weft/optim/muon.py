"""Muon for the matrices of the blocks, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.optim.parameters import parameter_groups
from weft.optim.several import Several

__all__ = ["beside_adamw", "muon", "tensors"]


def muon(
    model: nn.Module | Iterable[dict[str, Any]],
    lr: float = 1e-3,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
) -> Several:
    """Muon: the momentum of each matrix of the blocks, made orthogonal; AdamW at the same rate for everything else.

        M <- mu M + (1 - mu) G,   W <- W - lr a NS(mu M + (1 - mu) G),   a = 0.2 sqrt(max(out, in))

    With "match_rms_adamw" a step is as large as AdamW's, so that its rates serve; "original" is a = sqrt(max(1,
    out / in)), and wants larger ones. NS is five Newton-Schulz steps in bf16. Explicit groups with a "rank" (any) get
    Muon, those without AdamW.

    Args:
        weight_decay: decoupled, on the matrices alone.
        seed: of nothing, as it draws no numbers.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), and Liu et al. 2025, arXiv 2502.16982, for the size
    of a step; both are torch's own `torch.optim.Muon`.
    Deviations: none of ours; no decay unless asked for, where torch's default is 0.1.
    """
    matrices, others = parameter_groups(model)
    orthogonal = torch.optim.Muon(
        tensors(matrices), lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
        ns_steps=iterations, adjust_lr_fn=adjust,
    )  # fmt: skip
    return beside_adamw(orthogonal, others, lr, betas, eps)


def beside_adamw(
    own: torch.optim.Optimizer, others: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> Several:
    """An optimizer, and AdamW without decay for the groups that it does not take."""
    rest = tensors(others)
    if not rest:
        return Several([own])
    on_gpu = all(p.is_cuda for group in rest for p in group["params"])
    return Several([own, torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=on_gpu or None)])


def tensors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups without names and ranks."""
    plain: list[dict[str, Any]] = []
    for group in groups:
        params: list[Tensor] = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        plain.append({key: value for key, value in group.items() if key != "rank"} | {"params": params})
    return plain
