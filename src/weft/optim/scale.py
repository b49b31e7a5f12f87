"""SCALE: normalised gradients without state, and momentum for the output head alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.optim.base import Field, Inner, Matrix, Move, Rows, Scalar, State
from weft.optim.inner import AdamW
from weft.optim.lowrank import LowRank
from weft.optim.parameters import split_parameters
from weft.optim.projections import Whole

__all__ = ["Normalised", "scale"]


@dataclass(frozen=True)
class Normalised(Inner):
    """N = m / max(rms(m), eps) over one dimension; m = beta m + (1 - beta) R, or R itself for beta 0, without state.

    over "in": each row has mean square 1; "out": each column. A row, or column, of zeros stays zero.

    Source: Glentis et al. 2025, arXiv 2506.16659.
    """

    beta: float = 0.0
    over: Literal["in", "out"] = "in"
    eps: float = 1e-8
    decay_first: bool = True

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        return self.over == "in"

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"momentum": Field((matrix.rows, matrix.cols), matrix.dtype, rows=True)} if self.beta else {}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        m = R.to(torch.promote_types(R.dtype, torch.float32))
        if self.beta:
            m = torch.lerp(m, state["momentum"].to(m.dtype), self.beta)
            state["momentum"].copy_(m)
        if self.over == "in":
            mean = m.square().mean(-1, keepdim=True)
        else:
            mean = rows.sum(m.square().sum(-2, keepdim=True)) / rows.total
        return m / mean.sqrt().clamp_min(self.eps), 1.0

    def transfer(self, state: State, move: Move) -> None:
        if self.beta:
            state["momentum"].copy_(move(state["momentum"], 1))


def scale(
    model: nn.Module | Iterable[dict[str, Any]],
    lr: float = 1e-3,
    *,
    beta: float = 0.9,
    vector_rate: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **options: Any,
) -> LowRank:
    """SCALE: every matrix steps along its gradient, each row at mean square 1, and nothing is kept of it.

        W <- (1 - lr wd) W - lr G / rms(G),   rms over `in`; over the vocabulary for the embedding
        head: m <- beta m + (1 - beta) G takes the place of G

    Vectors (norms, biases) get AdamW at lr * `vector_rate`. Of explicit groups, those with a "rank" (any) are matrices,
    others with matrices in them the head, and the rest vectors.

    Source: Glentis et al. 2025, arXiv 2506.16659, whose "column" is a row of torch's (out, in) layout.
    Deviations: weight decay is that of the blocks' matrices alone; a tied head is the head, with momentum;
    `vector_rate` is 1 where the paper names no rate.
    """
    decay = options.pop("weight_decay", 0.0)
    rules: dict[str, dict[str, Any]] = {
        "blocks": {"inner": Normalised(), "weight_decay": decay},
        "transposed": {"inner": Normalised(over="out"), "weight_decay": decay},  # what a Conv1D holds is (in, out)
        "embedding": {"inner": Normalised(over="out"), "weight_decay": 0.0},
        "head": {"inner": Normalised(beta), "weight_decay": 0.0},
        "vectors": {"inner": AdamW(betas, eps), "weight_decay": 0.0, "lr": lr * vector_rate},
    }
    groups = [{"params": params, **rules[kind]} for kind, params in _sorts(model).items()]
    return LowRank(groups, lr, projection=Whole(), **options)


def _sorts(model: nn.Module | Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """The trainable parameters by what is done with them."""
    found: dict[str, list[Any]] = {"blocks": [], "transposed": [], "embedding": [], "head": [], "vectors": []}
    if isinstance(model, nn.Module):
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        turned = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
        blocks, others = split_parameters(model)
        for entry in blocks:
            found["transposed" if id(entry[1]) in turned else "blocks"].append(entry)
        for name, p in others:
            table = id(p) in tables - heads
            found["embedding" if table else "head" if p.dim() == 2 else "vectors"].append((name, p))
    else:
        for group in model:
            for entry in group["params"]:
                p = entry[1] if isinstance(entry, tuple) else entry
                found["blocks" if "rank" in group else "head" if p.dim() == 2 else "vectors"].append(entry)
    return {kind: params for kind, params in found.items() if params}
