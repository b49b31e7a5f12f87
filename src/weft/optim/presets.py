"""The published subspace optimizers, each a few lines of composition (`weft.optim.LowRank`).

Every preset takes a model (the matrices of its blocks are projected, see `weft.optim.parameters`) or explicit groups,
of which those with a "rank" are projected. `rank` is r, or as a float the density r / s of the projected side s.
Every preset also takes the `Options` below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft.errors import WeftError, unknown
from weft.optim.base import Inner, Projection, Refresh
from weft.optim.inner import SGD, Adam, Adam8bit, AdamW, Lion
from weft.optim.limiter import NormGrowth
from weft.optim.lowrank import LowRank
from weft.optim.parameters import parameter_groups, split_parameters
from weft.optim.projections import (
    DCT,
    SVD,
    Blocks,
    Columns,
    Gaussian,
    Orthogonal,
    RandomizedSVD,
    Sparse,
    Subspace,
    Whole,
)
from weft.optim.residual import NormScaled, Plain, Sign
from weft.optim.weightnorm import RowNorm, normalize_weights

__all__ = ["Options", "apollo", "apollo_mini", "dct_adamw", "fira", "frugal", "galore", "galore_8bit", "gradnormlorp"]

Model = nn.Module | Iterable[dict[str, Any]]
Betas = tuple[float, float]
PROJECTIONS: dict[str, Any] = {
    "svd": SVD,
    "randomized": RandomizedSVD,
    "subspace": Subspace,
    "random": Orthogonal,
    "gaussian": Gaussian,
    "sparse": Sparse,
    "dct": DCT,
    "columns": Columns,
    "rows": Columns,
    "blocks": Blocks,
    "identity": lambda rank: Whole(),  # the inner rule in full, at the preset's rates: what the subspace itself costs
}


class Options(TypedDict, total=False):
    """Keyword arguments of every preset, as in `LowRank`; `exclude`: parts of names that are not to be projected."""

    weight_decay: float
    moments: Literal["keep", "rotate", "reset"]
    side: Literal["short", "left", "right"]
    rounding: Literal["nearest", "stochastic", "master"]
    state_dtype: torch.dtype | None
    nonfinite: Literal["skip", "raise"] | None
    seed: int
    compiled: bool
    exclude: Sequence[str]


def _build(
    model: Model,
    projection: str | Callable[[int | float], Projection | Blocks],
    rank: int | float,
    lr: float,
    inner: Inner,
    options: Options,
    **pieces: Any,
) -> LowRank:
    """The projected groups with all pieces, the others with the inner rule alone at the full learning rate."""
    chosen: dict[str, Any] = dict(options)
    if isinstance(projection, str) and projection not in PROJECTIONS:
        raise unknown("projection", projection, PROJECTIONS)
    make = PROJECTIONS[projection] if isinstance(projection, str) else projection
    projected, plain = parameter_groups(model, chosen.pop("exclude", ()))
    for group in projected:
        group["projection"] = make(group.pop("rank", rank))
    whole = {"projection": Whole(), "residual": None, "limiter": None, "scale": 1.0, "moments": "keep"}
    return LowRank(projected + [group | whole for group in plain], lr, inner=inner, **(pieces | chosen))


def galore(
    model: Model,
    rank: int | float = 128,
    lr: float = 1e-2,
    *,
    refresh: int | Refresh = 200,
    scale: float = 0.25,
    projection: str = "subspace",
    inner: Inner | None = None,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    **options: Unpack[Options],
) -> LowRank:
    """GaLore: Adam on the gradient's top singular directions.

        R = G P,  m, v = Adam moments of R,  W -= lr c scale (m / (sqrt(v) + eps)) P^T,  c = sqrt(1 - b2^t) / (1 - b1^t)

    P (s x r) is refreshed every 200 steps, moments kept; other parameters get the same Adam at the full lr.
    Published ranks: 128 / 256 / 256 / 512 for LLaMA 60M / 130M / 350M / 1B.

    Source: Zhao et al. 2024, arXiv 2403.03507; defaults of the released code (eps 1e-6; the paper's text says 1e-8).
    Deviations: P is found by warm-started subspace iteration; projection="svd" is the published choice. Columns keep
    canonical signs across refreshes.
    """
    return _build(
        model, projection, rank, lr, inner or Adam(betas, eps), options, refresh=refresh, scale=scale
    )  # fmt: skip


def galore_8bit(
    model: Model,
    rank: int | float = 128,
    lr: float = 1e-2,
    *,
    refresh: int | Refresh = 200,
    scale: float = 0.25,
    projection: str = "subspace",
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    **options: Unpack[Options],
) -> LowRank:
    """GaLore with block-wise 8-bit moments (`Adam8bit`), on any device.

    Weights whose projected gradient has fewer than 4096 entries keep fp32 moments, as in the released code.

    Source: Zhao et al. 2024 with Dettmers et al. 2022, arXiv 2110.02861; defaults of the released code, whose inner
    rule is bitsandbytes' Adam (eps 1e-8 on the corrected moment).
    Deviations: as `galore` and `Adam8bit`; weight decay comes before the update.
    """
    return galore(
        model, rank, lr, refresh=refresh, scale=scale, projection=projection, inner=Adam8bit(betas, eps, "torch"),
        **options
    )  # fmt: skip


def fira(
    model: Model,
    rank: int | float = 128,
    lr: float = 1e-2,
    *,
    refresh: int | Refresh = 200,
    scale: float = 0.25,
    projection: str = "subspace",
    residual: Literal["official", "paper"] = "official",
    gamma: float = 1.01,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    **options: Unpack[Options],
) -> LowRank:
    """Fira: GaLore, plus the rest of the gradient scaled row by row as Adam scaled the inside, its growth limited.

        S_j = (||N_j|| / ||R_j||) (G - a R P^T)_j,  ||S|| may grow by gamma a step,  W -= lr c (scale N P^T + S)

    residual "official": a = scale, as in the code behind the published numbers; "paper": a = 1.
    Published scale: 0.25 below 1B parameters, 0.0625 from there.

    Source: Chen et al. 2024, arXiv 2410.01623.
    Deviations: as `galore`, and a first gradient of zero does not freeze the limiter (`NormGrowth`).
    """
    outside = NormScaled(scale if residual == "official" else 1.0)
    return _build(
        model, projection, rank, lr, Adam(betas, eps), options,
        refresh=refresh, scale=scale, residual=outside, limiter=NormGrowth(gamma),
    )  # fmt: skip


def frugal(
    model: Model,
    rank: int | float = 0.25,
    lr: float = 1e-3,
    *,
    refresh: int = 200,
    scale: float = 1.0,
    projection: str = "blocks",
    order: Literal["descending", "ascending", "mirror", "random"] = "descending",
    residual: Literal["sign", "sgd"] | None = "sign",
    residual_scale: float = 1.0,
    inner: Literal["adamw", "lion", "sgd"] = "adamw",
    betas: Betas | None = None,
    eps: float = 1e-8,
    **options: Unpack[Options],
) -> LowRank:
    """FRUGAL: a stateful rule on a part of the space, signSGD on the rest; the part is drawn anew every 200 steps.

        A = down(G),  W -= lr scale (up(AdamW(A)) + residual_scale sign(G - up(A))),  moments reset at a refresh

    projection: "blocks" as in the pre-training scripts, a quarter of the matrices as a whole, in turn from the last to
    the first (`order`); "columns" or "rows" of the stored matrix as in the fine-tuning scripts (there with
    residual_scale 0.1); "svd", "random" ... of its shorter side, as in GaLore. `rank` is the density.

    Source: Zmushko et al. 2024, arXiv 2411.07837, and its released code.
    Deviations: the sign of a residual below the rounding of G counts as 0; no single entries drawn at random, whose
    positions cost more than their moments.
    """
    if projection == "blocks" and not (isinstance(rank, float) and 0 <= rank <= 1):
        raise WeftError(f"The rank is {rank!r}: blocks are whole matrices, so give their share, from 0.0 to 1.0.")
    rules: dict[str, Any] = {"adamw": lambda b: AdamW(b, eps), "lion": Lion, "sgd": lambda b: SGD(b[0])}
    if inner not in rules:
        raise unknown("inner rule", inner, rules)
    default = (0.9, 0.99) if inner == "lion" else (0.9, 0.999)
    outside = {"sign": Sign, "sgd": Plain}[residual](scale * residual_scale) if residual else None
    sides: dict[str, Any] = {"columns": "right", "rows": "left"}
    settings: Options = {"moments": "reset", "side": sides.get(projection, "short"), **options}
    make = partial(Blocks, order=order) if projection == "blocks" else projection
    rule = rules[inner](betas or default)
    return _build(model, make, rank, lr, rule, settings, refresh=refresh, scale=scale, residual=outside)


def apollo(
    model: Model,
    rank: int | float = 256,
    lr: float = 1e-2,
    *,
    refresh: int | Refresh = 200,
    scale: float = 1.0,
    projection: str = "gaussian",
    granularity: Literal["channel", "tensor"] = "channel",
    gamma: float = 1.01,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    **options: Unpack[Options],
) -> LowRank:
    """APOLLO: the raw gradient, each channel scaled by the factor Adam has on a random sketch of it.

        R = G P, P ~ N(0, 1/r);  s_j = ||Adam(R)_j|| / ||R_j||;  W -= lr c sqrt(scale) limit(s_j G_j)

    P is drawn from a seed at every use and never stored; moments are kept when the seed changes.
    Published ranks: 128 / 192 / 256 / 256 for LLaMA 60M / 130M / 350M / 1B.

    Source: Zhu et al. 2024, arXiv 2412.05270, written from the formulas.
    Deviations: P is not part of the state.
    """
    outside = NormScaled(0.0, granularity, math.sqrt(scale))
    return _build(
        model, projection, rank, lr, Adam(betas, eps), options,
        refresh=refresh, scale=0.0, residual=outside, limiter=NormGrowth(gamma),
    )  # fmt: skip


def apollo_mini(
    model: Model,
    rank: int | float = 1,
    lr: float = 1e-2,
    *,
    refresh: int | Refresh = 200,
    scale: float = 128.0,
    **options: Unpack[Options],
) -> LowRank:
    """APOLLO-Mini: one factor a matrix, from a rank-1 sketch; the update is multiplied by sqrt(scale) = 11.3.

    Source and deviations: `apollo`.
    """
    return apollo(model, rank, lr, refresh=refresh, scale=scale, granularity="tensor", **options)


def dct_adamw(
    model: Model,
    rank: int | float = 128,
    lr: float = 1e-3,
    *,
    refresh: int = 1,
    score: Literal["l1", "l2"] = "l1",
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    **options: Unpack[Options],
) -> LowRank:
    """DCT-AdamW: AdamW on the r discrete cosine coefficients that align best with the gradient, chosen at every step.

        idx = top r columns of |G C^T|_1,  R = G C^T[:, idx],  W -= lr up(AdamW(R)) after W *= 1 - lr wd

    Only 2 r integers a matrix, places and ages, are stored beside the moments.

    Source: Modoranu et al. 2025, arXiv 2505.17967.
    Deviations: moments follow their basis vector when the choice changes (the paper's rotation, off in the released
    code) and each column has its own age for the bias correction; DCT-II vectors on both sides; no error feedback;
    which parameters are projected is decided by `split_parameters`.
    """
    settings: Options = {"moments": "rotate", **options}
    return _build(model, partial(DCT, score=score), rank, lr, AdamW(betas, eps), settings, refresh=refresh)


def gradnormlorp(
    model: Model,
    rank: int | float = 128,
    lr: float = 1e-2,
    *,
    refresh: int | Refresh = 250,
    scale: float = 0.25,
    projection: str = "subspace",
    normalize: bool | None = None,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    **options: Unpack[Options],
) -> LowRank:
    """GradNormLoRP: weight normalisation W = g V / ||V||, with GaLore on the gradient of V and plain Adam on g.

        dg = rowsum(dW * V/||V||),  dV = (g / ||V||) (dW - dg V/||V||),  R = dV P

    On a plain model the block matrices are normalised here, in place (undo with `weft.optim.fold_weights`; under FSDP2
    or DDP call `weft.optim.normalize_weights` before sharding). On a model with frozen block weights (adapters) nothing
    is normalised and the trained factors' gradients are projected. `normalize` forces either.

    Source: Huang et al. 2024, arXiv 2412.19616; README defaults.
    Deviations: one-sided projection (the released code's default; the paper's is two-sided); the released optimizer
    normalises only the weight it writes and leaves out the tangent term of dV, here the gradient is the true one.
    """
    if isinstance(model, nn.Module) and (normalize or (normalize is None and _is_plain(model))):
        if isinstance(model, DistributedDataParallel):
            raise WeftError("Build gradnormlorp on the bare model, before DistributedDataParallel wraps it.")
        normalize_weights(model, [name for name, _ in split_parameters(model, options.get("exclude", ()))[0]])
    return galore(
        model, rank, lr, refresh=refresh, scale=scale, projection=projection, betas=betas, eps=eps, **options
    )  # fmt: skip


def _is_plain(model: nn.Module) -> bool:
    """Whether all linear weights are trained and none is normalised yet."""
    if any(isinstance(m, RowNorm) for m in model.modules()):
        return False
    return all(m.weight.requires_grad for m in model.modules() if isinstance(m, nn.Linear))
