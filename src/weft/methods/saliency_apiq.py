"""saliency-apiq: codes with learned ranges and low-rank factors that are found together, so that a layer gives what it
gave, most where the loss feels it (Cao and Aref, 2025, arXiv 2504.13932; ApiQ: Liao et al., 2024, arXiv 2402.05147).

    W' = Q(W; gamma, beta) + B A,   Q rounds to nearest on [sigmoid(beta) min, sigmoid(gamma) max]
    least  E(||W x_o - W' x||^2 + ||W x - W' x||^2) / 2 + saliency tr(X) / in sum_ij f_ij (W'_ij - W_ij)^2

min and max are a group's, x the layer's inputs in the model quantised so far, its factors included, x_o those in the
dense model, X = E[x x^T], and f the squared gradients of the loss (rank one, of mean 1). AdamW steps gamma, beta (from
4: 0.98 of the range), B and A; rounding counts as the identity. `before` has the last term see Q alone, the released
code's default. `rank` 64 of 4096 as published; null gives each matrix a sixty-fourth of its smaller side. Bits a
weight: those of `rtn`, and the factors'.
Deviations: by layer (ApiQ-lw), where the paper's runs go by block; the sums over tokens come from moments, so that each
step sees all of them, and there are fewer, at larger rates. B A starts as the best for the first codes (`eora`), not as
zero. f has the rows' and columns' sums of the squared gradients, not each; its mean of 1 and X stand for the paper's
lambda and its multiplier a block, of which the released scripts have 0.001 and 1, and the paper's tables say none. The
least of all steps is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.integer_grid import Grid, grouped, learned, ungrouped
from weft.linalg.principal import principal_factors
from weft.methods import rtn
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter, factor_bytes, low_rank_terms
from weft.terms import IntegerCode, LowRank

__all__ = ["METHOD", "Problem", "rank_of", "sizes", "solve"]

_START = 4.0
_RANGE_LR, _FACTOR_LR, _DECAY = 1e-1, 5e-3, 0.1


class Problem(NamedTuple):
    """What one layer is to become, in one floating dtype."""

    W: Tensor  # (out, in)
    target: Tensor  # (out, in): the map whose outputs are wanted, (W + W E[x_o x^T] X^-1) / 2
    X: Tensor  # (in, in)
    weight: Tensor  # (out, in): saliency tr(X) / in f
    bits: int
    group: int
    scale_dtype: torch.dtype
    before: bool

    def codes(self, ranges: Tensor) -> tuple[Tensor, Grid, Tensor]:
        """The codes (out, groups, group), the grids and the matrix (out, in) of range logits (2, out, groups, 1)."""
        codes, grid = learned(grouped(self.W, self.group), ranges.sigmoid(), self.bits, self.scale_dtype)
        return codes, grid, ungrouped(grid.values(codes), self.W.shape[1])

    def step(self, ranges: Tensor, B: Tensor, A: Tensor) -> Tensor:
        """The loss at these numbers, whose gradients are added to theirs."""
        with torch.enable_grad():
            Q, product = self.codes(ranges)[2], B @ A
        E = (Q + product).detach()
        D, far = E - self.target, (Q.detach() if self.before else E) - self.W
        G, P = D @ self.X, self.weight * far
        torch.autograd.backward([Q, product], [2 * (G + P), 2 * (G if self.before else G + P)])
        return (G * D).sum() + (P * far).sum()


def solve(problem: Problem, rank: int, steps: int) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Range logits (2, out, groups, 1), B (out, r) and A (r, in) of the least loss met, and the loss at each step."""
    W, groups = problem.W, -(-problem.W.shape[1] // problem.group)
    ranges = torch.full((2, len(W), groups, 1), _START, dtype=W.dtype, device=W.device)
    B, A, _ = principal_factors(problem.target - problem.codes(ranges)[2], C=problem.X, rank=rank)
    numbers = [ranges, B[:, :rank].to(W.dtype).contiguous(), A[:rank].to(W.dtype).contiguous()]
    rates, losses, best = (_RANGE_LR, _FACTOR_LR, _FACTOR_LR), list[float](), numbers
    parts = [{"params": [p.requires_grad_()], "lr": lr} for p, lr in zip(numbers, rates, strict=True)]
    optimizer = torch.optim.AdamW(parts, weight_decay=_DECAY, fused=True)
    for step in range(steps + 1):
        optimizer.zero_grad()
        losses.append(float(problem.step(*numbers)))
        if losses[-1] <= min(losses):
            best = [p.detach().clone() for p in numbers]
        if step < steps:
            for part, lr in zip(optimizer.param_groups, rates, strict=True):
                part["lr"] = lr * (1 - step / steps)
            optimizer.step()
    return best[0], best[1], best[2], losses


class _ApiQ(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes and factors of each width."""
        how = {name: options[name] for name in ("group", "saliency", "before")}
        for bits in sizes:
            problem = _problem(site, bits, **how)
            if torch.isinf(problem.codes(torch.full((2, 1, 1, 1), 50.0, device=site.device))[1].scale).any():
                raise WeftError(
                    f"Layer {site.name} cannot be coded: a scale is beyond {problem.scale_dtype}; leave it out by a "
                    "pattern."
                )
            ranges, B, A, _ = solve(problem, rank_of(site.shape, options["rank"]), options["steps"])
            codes, grid, _ = problem.codes(ranges)
            scale, zero = grid.scale.squeeze(-1).to(problem.scale_dtype), grid.zero.squeeze(-1)
            whole = ungrouped(codes, site.shape[1])
            code = IntegerCode.from_codes(whole, scale, zero, bits, options["group"], site.dtype)
            yield bits, Split({"base": code, "low_rank": LowRank.from_factors(B.to(site.dtype), A.to(site.dtype))})


def _problem(site: Site, bits: int, *, group: int | None, saliency: float, before: bool) -> Problem:
    target = site.weight()
    W = target if site.original is None else site.original.to(target)
    X, rows, columns = (site.moments[name].to(target) for name in ("input_moment", "fisher_rows", "fisher_columns"))
    f = torch.outer(rows / rows.mean(), columns / columns.mean())
    weight = f * (saliency * X.diagonal().mean())
    return Problem(W, target, X, weight, bits, group or W.shape[1], rtn.scale_dtype(site.dtype), before)


def rank_of(shape: tuple[int, int], rank: int | None) -> int:
    """The rank of a matrix of that shape (out, in): the one that is asked for, or a sixty-fourth of the smaller side.

    Raises:
        WeftError: the matrix has no such rank.
    """
    most = min(shape)
    if rank is not None and not 1 <= rank <= most:
        raise WeftError(f"Rank {rank} is not possible on a {shape[0]} x {shape[1]} matrix; give 1 to {most}.")
    return max(1, most // 64) if rank is None else rank


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, bytes of codes, scales, zero points and factors).

    Raises:
        WeftError: there are no codes of that width, or no such rank.
    """
    beside = factor_bytes(shape, rank_of((shape[0], shape[1]), options["rank"]))
    return [(bits, nbytes + beside) for bits, nbytes in rtn.sizes(shape, {**options, "symmetric": False})]


METHOD = Method(
    name="saliency-apiq",
    kind="quantize",
    summary="Codes with learned ranges and low-rank factors found together, to give what the layer gave.",
    paper="Cao and Aref, 2025, arXiv 2504.13932",
    needs=("input_moment", "fisher_rows", "fisher_columns"),
    allocate="equal",
    sequential=True,
    correction=0.5,
    split=_ApiQ(),
    sizes=sizes,
    trained=low_rank_terms,
    defaults={"bits": None, "group": 64, "rank": None, "steps": 200, "saliency": 0.1, "before": True},
)
