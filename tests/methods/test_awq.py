"""AWQ: the search finds what it says it minimises, by running tokens through; folding is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from weft.kernels.integer_grid import fit, grouped, to_codes
from weft.methods import METHODS, Site
from weft.methods.awq import clipped, scaled
from weft.seeds import generator
from weft.terms import Dense, ScaledCode


def layer(out=24, inn=64, tokens=300):
    """A weight and inputs, three channels of which are thirty times as large."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, inn, generator=draw)
    X[:, [3, 20, 41]] *= 30
    return torch.randn(out, inn, generator=draw), X


def rounded(W, bits, group):
    groups = grouped(W, group)
    grid = fit(groups, bits)
    return grid.values(to_codes(groups, grid)).flatten(1)[:, : W.shape[1]]


def site(W, X, size=3):
    moments = {"input_moment": (X.mT @ X / len(X)).double(), "input_abs_mean": X.abs().mean(0).double()}
    return Site("layer", {"base": Dense.from_matrix(W)}, size, size, moments, generator(0, "layer"))


def test_the_scales_are_those_of_the_power_whose_outputs_are_nearest():
    W, X = layer()
    m, errors = X.abs().mean(0), {}
    for i in range(20):
        s = m ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        r = (1 / s).half().float()
        errors[i] = float(((rounded(W / r, 3, 16) * r - W) @ X.mT).square().mean()), r
    expected = min(errors.values(), key=lambda found: found[0])
    assert expected[0] < 0.3 * errors[0][0]  # scaling pays where channels differ
    r = scaled(W, X.mT @ X / len(X), m, 3, 16)
    torch.testing.assert_close(r.float(), expected[1], atol=1e-3, rtol=1e-3)


def test_clipping_by_the_moment_is_clipping_by_the_tokens():
    W, X = layer()
    H, group = X.mT @ X / len(X), 16
    codes, grid = clipped(W, H, 2, group, [1.0, 0.8, 0.6])
    found = grid.values(codes)
    for i in range(3):
        for g in range(4):
            part, x = W[i, g * group : (g + 1) * group], X[:, g * group : (g + 1) * group]
            errors = []
            for shrink in (1.0, 0.8, 0.6):
                most = shrink * part.abs().max()
                own = fit(part.clamp(-most, most).unsqueeze(0), 2)
                errors.append(((own.values(to_codes(part.unsqueeze(0), own)) - part) @ x.mT).square().mean())
            now = ((found[i, g] - part) @ x.mT).square().mean()
            torch.testing.assert_close(now, min(errors), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", [None, 16, 24])
def test_the_term_is_the_rounded_scaled_weight_with_the_scales_taken_out(group):
    W, X = layer()
    method = METHODS["awq"]
    options = method.options({"group": group})
    term = method.split(site(W, X), **options).terms["base"]
    assert isinstance(term, ScaledCode)
    torch.testing.assert_close(term.dense(), term.inner.dense() * term.channel_scales().float())
    plain = METHODS["rtn"].split(site(W, X), bits=None, group=group, symmetric=False, clip=False).terms["base"].dense()
    lost, before = (((T - W) @ X.mT).square().mean() for T in (term.dense(), plain))
    assert lost < 0.5 * before


def test_a_channel_without_input_is_no_special_case():
    W, X = layer()
    X[:, 5] = 0
    for size in (2, 4, 8):
        term = METHODS["awq"].split(replace(site(W, X), size=size), **METHODS["awq"].options({})).terms["base"]
        assert torch.isfinite(term.dense()).all()
