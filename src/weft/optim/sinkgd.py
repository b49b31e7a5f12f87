"""Stateless rules: an update of prescribed size in several norms at once (SinkGD and its relatives), and the sign.

Legend: R (k, n, s) is a batch of gradients, n = out and s = in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.errors import WeftError, unknown
from weft.optim.base import Field, Inner, Matrix, Move, Rows, Scalar, State
from weft.optim.inner import AdamW
from weft.optim.lowrank import LowRank
from weft.optim.parameters import parameter_groups
from weft.optim.projections import Whole

__all__ = ["MultiNorm", "Sign", "sign", "sinkgd"]


@dataclass(frozen=True)
class MultiNorm(Inner):
    """Alternate projections on the spheres of several norms, all of Frobenius radius sqrt(n s). No state.

        "row":      X <- sqrt(s) * X / (row lengths)         "column":   X <- sqrt(n) * X / (column lengths)
        "max":      X <- sign(X)                             "spectral": X <- sqrt(max(n, s)) * U V^T, X = U S V^T

    ("row", "column") is SinkGD, Sinkhorn's algorithm on the squared entries; ("row", "spectral") with one iteration is
    SWAN's scheme. Rows and columns that are all zero, or shorter than 1e-7 of the gradient's norm (rounding noise that
    would become a full-size step), count as zero: they stay zero.

    Source: Scetbon et al. 2025, arXiv 2502.06742, algorithm MNGD.
    Deviations: that floor.
    """

    norms: tuple[str, ...] = ("row", "column")
    iterations: int = 5
    decay_first: bool = True
    rowwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in self.norms:
            if name not in _NORMS:
                raise unknown("norm", name, _NORMS)
        if self.iterations < 1 or not self.norms:
            raise WeftError("Multi-norm normalisation needs one norm and one iteration at least.")

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        R = R.to(torch.promote_types(R.dtype, torch.float32))  # the sum of many squares is beyond fp16
        peak = R.abs().amax(dim=(-2, -1), keepdim=True)
        if rows.group is not None:
            torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX, group=rows.group)
        # so that squares neither underflow nor overflow; the update does not depend on the gradient's size
        X = _Scaled(R / peak.clamp_min(torch.finfo(peak.dtype).tiny), rows)
        for name in self.norms * self.iterations:
            _NORMS[name](X)
        return X.value(), 1.0

    def transfer(self, state: State, move: Move) -> None:
        return None


@dataclass(frozen=True)
class Sign(Inner):
    """N = sign(R), with sign(0) = 0 (signSGD, Bernstein et al. 2018, arXiv 1802.04434). No state."""

    decay_first: bool = True

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        return R.sign(), 1.0

    def transfer(self, state: State, move: Move) -> None:
        return None


def sinkgd(
    model_or_groups: nn.Module | Iterable[dict[str, Any]],
    lr: float = 0.02,
    *,
    alpha: float = 0.05,
    iterations: int = 5,
    norms: tuple[str, ...] = ("row", "column"),
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **options: Any,
) -> LowRank:
    """SinkGD: stateless steps of root mean square lr * alpha for the linear layers, AdamW at lr for everything else.

        W <- W - lr * alpha * X,   X = SR-Sinkhorn(G): rows to length sqrt(in), columns to length sqrt(out), 5 times

    Gradient clipping has no effect on it, and gradient noise is not averaged over steps: it wants large batches.
    Explicit groups with a "rank" (any) are normalised, those without get AdamW.

    Source: Scetbon et al. 2025, arXiv 2502.06742; lr 0.02, alpha 0.05 and L = 5 as its re-implementations quote it.
    Deviations: rounding noise is not blown up (`MultiNorm`). The output head counts with the embeddings. A fused
    projection (qkv in one matrix) is normalised as the one matrix it is.
    """
    return _stateless(model_or_groups, lr, MultiNorm(tuple(norms), iterations), alpha, AdamW(betas, eps), options)


def sign(
    model_or_groups: nn.Module | Iterable[dict[str, Any]],
    lr: float = 0.02,
    *,
    alpha: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **options: Any,
) -> LowRank:
    """signSGD for the linear layers, W <- W - lr * alpha * sign(G), and AdamW at lr for everything else.

    Source: Bernstein et al. 2018, arXiv 1802.04434, without momentum. The defaults are SinkGD's, so that the two
    compare at equal step size.
    """
    return _stateless(model_or_groups, lr, Sign(), alpha, AdamW(betas, eps), options)


def _stateless(
    model_or_groups: nn.Module | Iterable[dict[str, Any]],
    lr: float,
    inner: Inner,
    alpha: float,
    rest: Inner,
    options: dict[str, Any],
) -> LowRank:
    if options.pop("rank", None) is not None:
        raise WeftError("SinkGD and sign are stateless and work on whole matrices; leave the rank out.")
    matrices, others = parameter_groups(model_or_groups, options.pop("exclude", ()))
    for group in matrices:
        group.pop("rank", None)
        _refuse_vectors(group["params"])
    groups = [{"inner": inner, "scale": alpha, **group} for group in matrices] + [{"inner": rest, **g} for g in others]
    return LowRank(groups, lr, projection=Whole(), **options)


def _refuse_vectors(params: Iterable[Any]) -> None:
    for entry in params:
        name, parameter = entry if isinstance(entry, tuple) else ("A parameter", entry)
        if parameter.dim() != 2:
            raise WeftError(
                f"{name} has shape {tuple(parameter.shape)}, and only matrices have rows and columns to normalise; "
                'put it in a group without "rank", which AdamW takes.'
            )


class _Scaled:
    """X = r G c with a factor for each row and column, so that a scaling costs one product of G^2 and a vector."""

    def __init__(self, G: Tensor, rows: Rows) -> None:
        self.rows = rows
        self.hold(G)

    def hold(self, G: Tensor) -> None:
        self.G, self.square = G, G.square()
        self.r, self.c = torch.ones_like(G[..., :1]), torch.ones_like(G[..., :1, :])

    def row(self) -> None:
        energy = self.square @ self.c.square().mT  # (k, n, 1)
        self.r = _factor(self.G.shape[-1], energy, self.rows.sum(energy.sum(dim=-2, keepdim=True)))

    def column(self) -> None:
        energy = self.rows.sum(self.r.square().mT @ self.square)  # (k, 1, s)
        self.c = _factor(self.rows.total, energy, energy.sum(dim=-1, keepdim=True))

    def max(self) -> None:
        self.hold(self.value().sign())

    def spectral(self) -> None:
        if self.rows.group is not None:
            raise WeftError("The spectral norm needs whole matrices; on sharded weights use row, column or max.")
        U, S, Vh = torch.linalg.svd(self.value(), full_matrices=False)
        kept = (1e-7 * S[..., :1] < S).to(S.dtype)
        self.hold((U * kept.unsqueeze(-2)) @ Vh * max(self.G.shape[-2:]) ** 0.5)

    def value(self) -> Tensor:
        return self.r * self.G * self.c


def _factor(target: int, energy: Tensor, whole: Tensor) -> Tensor:
    """What brings squared lengths `energy` to `target`; 0 for those that are only rounding noise beside the `whole`."""
    return torch.where(energy > 1e-14 * whole, (target / energy).sqrt(), 0.0)


_NORMS: dict[str, Callable[[_Scaled], None]] = {
    "row": _Scaled.row,
    "column": _Scaled.column,
    "max": _Scaled.max,
    "spectral": _Scaled.spectral,
}
