"""Optimizers whose state is of every weight as a whole: AdamW, also by width, and the two AdaGrads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from weft.optim.adagrad import AdaGrad, AdaGradNorm
from weft.optim.base import Inner
from weft.optim.inner import Adam8bit
from weft.optim.lowrank import LowRank
from weft.optim.mup import mup_groups
from weft.optim.parameters import Named, split_parameters
from weft.optim.projections import Whole

__all__ = ["adagrad", "adagrad_norm", "adamw", "adamw_8bit", "adamw_fp8"]

Model = nn.Module | Iterable[dict[str, Any]]


def adamw(
    model: Model,
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    base: nn.Module | None = None,
    decay: Literal["sqrt", "independent", "fixed"] = "sqrt",
    seed: int = 0,
) -> torch.optim.AdamW:
    """torch's AdamW, with weight decay on the blocks' matrices alone; fused on a GPU.

    Args:
        base: the narrow model of width scaling, and `decay` how weight decay scales (`weft.optim.mup.mup_groups`).
        seed: of nothing, as it draws no numbers.
    """
    if isinstance(model, nn.Module) and base is not None:
        groups = mup_groups(model, base, lr, weight_decay=weight_decay, decay=decay)
    else:
        groups = _groups(model, weight_decay)
    on_gpu = all(_tensor(p).is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=on_gpu or None)


def adamw_8bit(model: Model, lr: float = 1e-3, *, eps: float = 1e-8, **options: Any) -> LowRank:
    """AdamW with moments in a dynamic code of 8 bits, block by block: a quarter of the state.

    Vectors, and matrices below 4096 numbers, keep fp32 moments. Takes LowRank's options: weight_decay, rounding ...

    Source: Dettmers et al., 2022, arXiv 2110.02861.
    Deviations: those of `weft.optim.inner.Adam8bit`.
    """
    return _whole(model, lr, Adam8bit(eps=eps, form="torch"), options)


def adamw_fp8(model: Model, lr: float = 1e-3, *, eps: float = 1e-8, **options: Any) -> LowRank:
    """AdamW with moments in float8 (e4m3) with a scale for each block of 256: a quarter of the state, on any device.

    As `adamw_8bit`, with cheaper casts and coarser steps.

    Source: torchao's AdamWFp8, after Dettmers et al., 2022.
    Deviations: those of `weft.optim.inner.Adam8bit`.
    """
    return _whole(model, lr, Adam8bit(eps=eps, form="torch", code="float8"), options)


def adagrad(model: Model, lr: float = 1e-2, *, eps: float = 1e-10, **options: Any) -> LowRank:
    """AdaGrad: a <- a + G^2, W -= lr G / (sqrt(a) + eps), for every weight.

    Source: Duchi et al., 2011, JMLR 12; torch's defaults. Takes LowRank's options: weight_decay, rounding ...
    """
    return _whole(model, lr, AdaGrad(eps), options)


def adagrad_norm(model: Model, lr: float = 1e-2, *, eps: float = 1e-10, **options: Any) -> LowRank:
    """AdaGrad-Norm: a <- a + ||G||^2, W -= lr G / (sqrt(a) + eps), with one number a for a weight.

    Source: Ward, Wu and Bottou, 2019, arXiv 1806.01811.
    Deviations: a number for each weight, not one for the model.
    """
    return _whole(model, lr, AdaGradNorm(eps), options)


def _whole(model: Model, lr: float, inner: Inner, options: dict[str, Any]) -> LowRank:
    decay = options.pop("weight_decay", 0.0)
    made = LowRank(_groups(model, decay), lr, projection=Whole(), inner=inner, **options)
    made.defaults["weight_decay"] = decay  # as torch's own tell it, where no matrix is among the parameters
    return made


def _groups(model: Model, weight_decay: float) -> list[dict[str, Any]]:
    """The matrices of the blocks, decayed, and everything else, not; or the groups given."""
    if not isinstance(model, nn.Module):
        return list(model)
    parts: tuple[list[Named], list[Named]] = split_parameters(model, stacks=True)
    decays = (weight_decay, 0.0)
    return [{"params": part, "weight_decay": decay} for part, decay in zip(parts, decays, strict=True) if part]


def _tensor(entry: Any) -> torch.Tensor:
    """The parameter of a (name, parameter) pair, or itself."""
    found: torch.Tensor = entry[1] if isinstance(entry, tuple) else entry
    return found
