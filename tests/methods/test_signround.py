"""signround against its lines in fp64, weight by weight, and what its steps can reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weft.allocate import Shape
from weft.errors import WeftError
from weft.kernels.integer_grid import grouped, learned, ungrouped
from weft.methods import METHODS, Site
from weft.methods.signround import tuned
from weft.seeds import generator
from weft.terms import Dense, IntegerCode

OUT, IN, GROUP, TOKENS = 6, 16, 8, 80


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """W, the tokens x of the quantised model and x_o of the dense one."""
    draw = torch.Generator().manual_seed(0)
    W, x, noise = (torch.randn(*s, generator=draw).double() for s in ((OUT, IN), (TOKENS, IN), (TOKENS, IN)))
    x = x @ (torch.eye(IN) + 0.5).double()  # inputs that go together, so that rounding errors can be traded
    return W, x, x + 0.1 * noise


def problem() -> tuple[Tensor, Tensor, Tensor]:
    W, x, x_o = drawn()
    X = x.T @ x / TOKENS
    return W, W @ (x_o.T @ x / TOKENS) @ torch.linalg.inv(X), X


def lost(values: Tensor) -> float:
    W, x, x_o = drawn()
    return float((x_o @ W.T - x @ values.T).square().sum() / TOKENS)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_follows_its_lines(bits):
    W, target, X = problem()
    last, steps = 2**bits - 1, 10
    V, ends, losses = torch.zeros_like(W), torch.ones(2, OUT, IN // GROUP).double(), []
    for step in range(steps + 1):
        values, slopes = torch.zeros_like(W), []
        for i in range(OUT):
            for j in range(IN):
                g = j // GROUP
                part = W[i, g * GROUP : (g + 1) * GROUP]
                low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
                s = (high * float(ends[1, i, g]) - low * float(ends[0, i, g])) / last
                z = round(-low * float(ends[0, i, g]) / s)
                u = round(float(W[i, j]) / s + float(V[i, j])) + z
                number = min(max(u, 0), last) - z
                values[i, j] = number * s
                slopes.append((i, j, g, s, number, 0 <= u <= last, low, high))
        losses.append(lost(values))
        P, by_V, by_ends = (values - target) @ X, torch.zeros_like(V), torch.zeros_like(ends)
        for i, j, g, s, number, within, low, high in slopes:
            below = low * float(ends[0, i, g]) / s
            by_scale = number - (float(W[i, j]) / s if within else below)
            by_V[i, j] = float(P[i, j]) * s * within
            by_ends[0, i, g] += float(P[i, j]) * low * (-by_scale / last + (not within))
            by_ends[1, i, g] += float(P[i, j]) * high * by_scale / last
        rate = (1 - step / steps) / steps
        V, ends = V - rate * by_V.sign(), (ends - rate * by_ends.sign()).clamp(0, 1)
    codes, grid, found = tuned(W, target, X, bits, GROUP, steps, torch.float64)
    apart = [a - b for a, b in zip(losses, found, strict=True)]  # what no codes change
    assert max(apart) - min(apart) < 1e-8 * max(losses)
    assert lost(ungrouped(grid.values(codes), IN)) == pytest.approx(min(losses), rel=1e-9)


def test_without_steps_it_is_rounding_to_nearest_and_with_them_it_loses_much_less():
    W, target, X = problem()
    plain, _, losses = tuned(W, target, X, 3, GROUP, 0, torch.float32)
    nearest = IntegerCode.from_matrix(W.float(), 3, GROUP, scale_dtype=torch.float32)
    assert torch.equal(ungrouped(plain, IN), nearest.integer_codes().double()) and len(losses) == 1
    more = min(tuned(W, target, X, 3, GROUP, 200, torch.float32)[2])
    apart = lost(nearest.dense(torch.float64)) - losses[0]
    assert more + apart < 0.7 * (losses[0] + apart)


def test_all_steps_together_reach_half_a_code_and_ranges_stay_shares():
    steps = 200
    assert sum((1 - t / steps) / steps for t in range(steps)) == pytest.approx(0.5, abs=0.01)
    W, target, X = problem()
    codes, grid, _ = tuned(W, target, X, 4, GROUP, 60, torch.float64)
    whole = learned(grouped(W, GROUP), torch.ones(2, OUT, 2, 1).double(), 4, torch.float64)[1]
    assert bool((grid.scale <= whole.scale * (1 + 1e-12)).all()) and bool((grid.scale > 0).all())
    moved = codes - (grouped(W, GROUP) / grid.scale + grid.zero).clamp(0, 15)
    assert float(moved.abs().max()) <= 1.02


def test_a_layer_s_codes_are_of_the_weight_and_its_outputs_those_of_the_target():
    W, x, _ = drawn()
    method = METHODS["signround"]
    moments = {"input_moment": x.T @ x / TOKENS}
    site = Site("layer", {"base": Dense.from_matrix(1.1 * W.float())}, 4, 4, moments, generator(0, "layer"))
    options = method.options({"group": GROUP, "steps": 50})
    errors = []
    for original in (W, None):
        term = method.split(replace(site, original=original), **options).terms["base"]
        assert type(term) is IntegerCode and term.nbytes == dict(method.sizes(Shape(OUT, IN, 4), options))[4]
        errors.append(float((term.dense() - 1.1 * W).norm()))
    assert errors[0] > errors[1]
    with pytest.raises(WeftError, match="Layer layer cannot be coded: a scale is beyond .* leave it out by a pattern"):
        method.split(replace(site, terms={"base": Dense.from_matrix(1e9 * W.float())}), **options)
