"""BAQ: the closed form, the widths that come nearest to it, and GPTQ with a width a column."""

from __future__ import annotations

import pytest
import torch

from weft.kernels.integer_grid import of_range
from weft.linalg.column_errors import columns
from weft.methods import METHODS, Site, gptq
from weft.methods.baq import MEANS, closed_form, quantise, sizes, widths
from weft.methods.base import Shape
from weft.seeds import generator
from weft.terms import ColumnCode, Dense, build

BAQ = METHODS["baq"]


def drawn(out=40, inn=48):
    """A weight, and a moment of correlated inputs of very different sizes."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, inn, generator=draw, dtype=torch.float64) @ torch.randn(inn, inn, generator=draw).double()
    x = x * torch.logspace(-1.5, 1.5, inn, dtype=torch.float64)[torch.randperm(inn, generator=draw)]
    return torch.randn(out, inn, generator=draw), x.mT @ x / 400


def made(W, H, size):
    site = Site("layer", {"base": Dense.from_matrix(W)}, size, size, {"input_moment": H}, generator(0, "layer"))
    return BAQ.split(site, **BAQ.options({})).terms["base"]


def error(T, W, H):
    D = T.double() - W.double()
    return float(((D @ H) * D).sum())


def test_the_closed_form_makes_losses_equal_and_keeps_the_mean():
    l = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp().square()
    b = closed_form(l, 3.0)
    assert float(b.mean()) == pytest.approx(3.0, abs=1e-12)
    after = l * 2 ** (-1.95 * (b - 3.0))
    torch.testing.assert_close(after, torch.full_like(after, float(l.log().mean().exp())))
    assert torch.equal(closed_form(torch.full((5,), 0.25), 3.0), torch.full((5,), 3.0))


@pytest.mark.parametrize("mean", [2.0, 2.25, 3.0, 5.5])
def test_whole_widths_are_the_best_there_are(mean):
    l = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(8).exp()
    b = widths(l, round(mean * 64))
    assert int(b.sum()) == round(mean * 64) and set(b.tolist()) <= {0, 2, 3, 4, 5, 6, 7, 8}
    free = closed_form(l, mean)
    inner = (b > 2) & (b < 8)
    if mean == 3.0:
        shift = (b - free)[inner]
        assert float(shift.max() - shift.min()) <= 1 + 1e-9  # rounded, and moved together by what the ends hold back

    def loss(w):
        return float((l * 2.0 ** (-1.95 * w)).sum())

    for j in range(64):
        for k in range(64):
            moved = b.clone()
            moved[j], moved[k] = moved[j] + 1, moved[k] - 1
            if j != k and moved[j] <= 8 and moved[k] >= 2 and b[j] >= 2:
                assert loss(moved) >= loss(b) * (1 - 1e-12)


def test_equal_losses_have_equal_widths_and_no_loss_has_no_bits():
    assert widths(torch.ones(10), 30).tolist() == [3] * 10
    assert widths(torch.tensor([0.0, 1, 1, 1]), 12).tolist() == [0, 4, 4, 4]
    assert sum(widths(torch.tensor([1.0, 1e-9, 1e-9]), 9).tolist()) == 9


def test_a_constant_width_is_gptq_with_one_scale_a_row():
    W, H = drawn()
    how = columns(H)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    codes, losses = quantise(W, how, torch.full((48,), 3), (low, high))
    grid = of_range(low.unsqueeze(1), high.unsqueeze(1), 3)
    theirs = gptq.quantise(W, how, 3, 48)
    assert torch.equal(codes, theirs.codes)
    damped = H + torch.eye(48, dtype=torch.float64) * (0.01 * H.diagonal().mean())
    assert float(losses.sum()) == pytest.approx(error(grid.values(codes), W, damped) / 2, rel=1e-4)


@pytest.mark.parametrize("mean", [2.0, 2.5, 3.0])
def test_it_loses_less_than_gptq_at_the_same_mean_width(mean):
    W, H = drawn()
    term = made(W, H, mean)
    assert isinstance(term, ColumnCode) and int(term.column_widths().sum()) == round(mean * 48)
    how, up = columns(H), int(mean + 0.5)
    plain = gptq.quantise(W, how, up, 48)
    assert error(term.dense(), W, H) < 0.6 * error((plain.codes - plain.zero) * plain.scale, W, H)


def test_bytes_are_those_offered_and_nothing_is_lost_on_the_way_to_a_file():
    W, H = drawn(33, 50)
    offered = dict(sizes(Shape(33, 50), {}))
    assert list(offered) == list(MEANS)
    for mean in (2.25, 3.0, 8.0):
        term = made(W, H, mean)
        assert term.nbytes == offered[mean]
        again = build(term.spec())
        again.load_state_dict(term.state_dict())
        assert torch.equal(again.dense(), term.dense())
    assert error(made(W, H, 8.0).dense(), W, H) < 1e-3 * error(torch.zeros(33, 50), W, H)


def test_columns_without_bits_are_zero_and_each_number_is_the_nearest():
    W = drawn()[0]
    b = torch.tensor([0, 2, 8, 5] * 12)
    term = ColumnCode.from_matrix(W, b)
    assert torch.equal(term.column_widths().long(), b) and bool((term.dense()[:, b == 0] == 0).all())
    low, high = term.row_ranges()
    for bits in (2, 5, 8):
        step = (high - low) / (2**bits - 1)
        assert bool(((term.dense() - W)[:, b == bits].abs() <= step * 0.51 + step).all())
        inside = ((term.dense() - W)[:, b == bits].abs() <= step * 0.51).float().mean()
        assert float(inside) > 0.9  # all but those at an end, which moves by up to half a step with the zero point


def test_a_dead_input_takes_no_bits():
    W, H = drawn()
    H[7], H[:, 7] = 0, 0
    assert int(made(W, H, 3.0).column_widths()[7]) == 0
