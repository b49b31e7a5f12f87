"""saliency-apiq against its lines in fp64, token by token and weight by weight, and what its start and its end owe."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.methods.one_layer import close
from tests.methods.test_structures import PlainAdam
from weft.errors import WeftError
from weft.methods import METHODS, Site
from weft.methods.saliency_apiq import Problem, rank_of, solve
from weft.seeds import generator
from weft.terms import Dense, IntegerCode
from weft.verbs.placing import _corrected

OUT, IN, GROUP, BITS, RANK, TOKENS = 6, 16, 8, 2, 2, 60
LAST = 2**BITS - 1


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, f, the tokens x of the quantised model and x_o of the dense one."""
    draw = torch.Generator().manual_seed(0)
    W, f, x, noise = (
        torch.randn(n, m, generator=draw).double() for n, m in ((OUT, IN), (OUT, IN), *[(TOKENS, IN)] * 2)
    )
    return W, f.square(), x, x + 0.3 * noise


def problem(saliency: float = 0.1, before: bool = True) -> Problem:
    W, f, x, x_o = drawn()
    X = x.T @ x / TOKENS
    target = W @ (X + x_o.T @ x / TOKENS) @ torch.linalg.inv(X) / 2
    weight = saliency * X.trace() / IN * f
    return Problem(W, target, X, weight, BITS, GROUP, torch.float64, before)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def rounded(W: Tensor, ranges: Tensor) -> tuple[Tensor, list[list[tuple[float, ...]]]]:
    """Q, and for each weight what its slopes need: code - zero, w / s, whether it lies within, -low / s, the ends."""
    Q, facts = torch.zeros_like(W), [[(0.0,)] * IN for _ in range(OUT)]
    for i in range(OUT):
        for g in range(IN // GROUP):
            numbers = W[i, g * GROUP : (g + 1) * GROUP].tolist()
            low, high = min(*numbers, 0.0), max(*numbers, 0.0)
            a, b = float(ranges[0, i, g, 0]), float(ranges[1, i, g, 0])
            s = (sigmoid(b) * high - sigmoid(a) * low) / LAST
            z = round(-sigmoid(a) * low / s)
            for j, w in enumerate(numbers):
                c = min(max(round(w / s) + z, 0), LAST)
                Q[i, g * GROUP + j] = (c - z) * s
                within = 0 <= round(w / s) + z <= LAST
                facts[i][g * GROUP + j] = (c - z, w / s, within, sigmoid(a) * low / s, low, high)
    return Q, facts


def pulled(P: Tensor, facts: list[list[tuple[float, ...]]], ranges: Tensor) -> Tensor:
    """The gradient of the range logits, of that of Q: rounding counts as the identity."""
    found = torch.zeros_like(ranges)
    for i in range(OUT):
        for j in range(IN):
            number, over, within, lower, low, high = facts[i][j]
            by_scale = number - (over if within else lower)  # outside, the zero point moves the value
            by_low = -by_scale / LAST + (0.0 if within else 1.0)
            a, b = (sigmoid(float(ranges[k, i, j // GROUP, 0])) for k in (0, 1))
            found[0, i, j // GROUP, 0] += float(P[i, j]) * by_low * low * a * (1 - a)
            found[1, i, j // GROUP, 0] += float(P[i, j]) * by_scale / LAST * high * b * (1 - b)
    return found


@pytest.mark.parametrize("before", [True, False])
def test_it_follows_its_lines(before):
    steps, p = 40, problem(0.5, before)
    W, f, x, x_o = drawn()
    ranges = torch.full((2, OUT, IN // GROUP, 1), 4.0, dtype=torch.float64)
    D = p.target - rounded(W, ranges)[0]
    values, vectors = torch.linalg.eigh(D @ p.X @ D.T)
    B = vectors[:, values.argsort(descending=True)[:RANK]]
    A = B.T @ D
    balance = (A.norm(dim=1) / B.norm(dim=0)).sqrt()
    B, A = B * balance, A / balance[:, None]
    adams, losses = [PlainAdam() for _ in range(3)], []
    spread = float(p.X.trace()) / IN
    for step in range(steps + 1):
        Q, facts = rounded(W, ranges)
        E = Q + B @ A
        far = (Q if before else E) - W
        tokens = (x_o @ W.T - x @ E.T).square().sum() + (x @ W.T - x @ E.T).square().sum()
        losses.append(float(tokens / TOKENS / 2 + 0.5 * spread * (f * far.square()).sum()))
        G = (x @ E.T - x_o @ W.T + x @ E.T - x @ W.T).T @ x / TOKENS
        P = spread * f * far
        to_product = G if before else G + P
        gradients = [pulled(G + P, facts, ranges), to_product @ A.T, B.T @ to_product]
        share = 1 - step / steps
        new = []
        for value, adam, gradient, lr in zip((ranges, B, A), adams, gradients, (1e-1, 5e-3, 5e-3), strict=True):
            move = adam.step(gradient) / 1e-2 * lr * share
            new.append(value * (1 - 0.1 * lr * share) - move)
        ranges, B, A = new
    *_, found = solve(p, RANK, steps)
    apart = [a - b for a, b in zip(losses, found, strict=True)]  # what no choice of E changes
    assert max(apart) - min(apart) < 1e-7 * max(losses) and losses[0] - min(losses) > 1e-3
    assert found[0] - min(found) == pytest.approx(losses[0] - min(losses), rel=1e-6)


def test_it_begins_with_rounding_to_nearest_on_nearly_the_whole_range():
    W = drawn()[0]
    p = problem()
    whole = IntegerCode.from_matrix(W.float(), BITS, GROUP, scale_dtype=torch.float32).dense()
    close(p.codes(torch.full((2, OUT, 2, 1), 60.0, dtype=torch.float64))[2], whole, 1e-6)
    _, grid, _ = p.codes(torch.full((2, OUT, 2, 1), 4.0, dtype=torch.float64))
    exact = p.codes(torch.full((2, OUT, 2, 1), 60.0, dtype=torch.float64))[1].scale
    close(grid.scale, 0.98201379 * exact, 1e-7)


def test_more_steps_lose_less_and_with_every_rank_nothing_is_lost():
    p = problem(0.0)
    least = [min(solve(p, RANK, steps)[3]) for steps in (0, 10, 40)]
    assert least[0] > least[1] > least[2]
    assert min(solve(p, OUT, 0)[3]) < 1e-9 * least[0]
    ranges, B, A, losses = solve(p, RANK, 40)
    D = p.codes(ranges)[2] + B @ A - p.target
    assert float(((D @ p.X) * D).sum()) == pytest.approx(min(losses), rel=1e-9)


def test_saliency_draws_what_is_felt_towards_the_weight():
    W, f, *_ = drawn()
    errors = []
    for saliency in (0.0, 10.0):
        p = problem(saliency, before=False)
        ranges, B, A, _ = solve(p, RANK, 40)
        errors.append(float((f * (p.codes(ranges)[2] + B @ A - W).square()).sum()))
    assert errors[1] < 0.9 * errors[0]


def site(dtype: torch.dtype = torch.float32) -> Site:
    W, f, x, _ = drawn()
    moments = {"input_moment": x.T @ x / TOKENS, "fisher_rows": f.sum(1), "fisher_columns": f.sum(0)}
    return Site("layer", {"base": Dense.from_matrix(W.to(dtype))}, 2, 2, moments, generator(0, "layer"), dtype)


def test_a_layer_s_terms_are_its_codes_and_factors_and_what_is_asked_of_them_is_told_apart():
    method = METHODS["saliency-apiq"]
    W = drawn()[0]
    now = {"group": GROUP, "rank": RANK, "steps": 40}
    made = [method.split(site(), **method.options({**now, **more})) for more in ({}, {"saliency": 0.0})]
    assert all(set(split.terms) == {"base", "low_rank"} for split in made)
    assert not torch.equal(made[0].terms["base"].dense(), made[1].terms["base"].dense())
    drifted = replace(site(), terms={"base": Dense.from_matrix(2 * W.float())}, original=W)
    far = method.split(drifted, **method.options({**now, "rank": OUT}))
    given = sum(term.dense().detach() for term in far.terms.values())
    assert float((given - 2 * W).norm()) < 0.1 * float(W.norm())  # outputs are those of the target
    assert float((far.terms["base"].dense() - W).norm()) < 0.9 * float(W.norm())  # and codes are of the weight


def test_the_corrected_map_is_the_one_whose_outputs_the_page_wants():
    W, _, x, x_o = drawn()
    X, C = x.T @ x / TOKENS, x_o.T @ x / TOKENS
    close(_corrected(W, X, C, 0.5), problem().target, 1e-3)


@pytest.mark.parametrize(("rank", "most"), [(0, 6), (7, 6)])
def test_a_rank_that_is_none_is_refused(rank, most):
    with pytest.raises(WeftError, match=f"Rank {rank} is not possible on a 6 x 16 matrix; give 1 to {most}"):
        rank_of((OUT, IN), rank)
    assert rank_of((4096, 11008), None) == 64 and rank_of((48, 64), None) == 1
