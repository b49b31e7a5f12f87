"""Integer codes by group: exact about what they store, nearest on their grid, and what their accessors say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import WeftError
from weft.kernels.integer_grid import fit, grouped, of_range, to_codes
from weft.terms import IntegerCode, build


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 3, 8, 64]),
    symmetric=st.booleans(),
    inputs=st.integers(1, 20),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_a_matrix_on_the_grid_comes_back_and_the_bytes_are_those_of_the_formula(
    bits, group, symmetric, inputs, scale_dtype
):
    out, groups = 5, -(-inputs // (group or inputs))
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=draw)
    zero = None if symmetric else torch.randint(0, 2**bits, (out, groups), generator=draw)
    scale = (torch.rand(out, groups, generator=draw) + 0.1).to(scale_dtype)
    term = IntegerCode.from_codes(codes, scale, zero, bits, group)
    shift = torch.full((out, groups), 2 ** (bits - 1)) if symmetric else zero
    of = [j // (group or inputs) for j in range(inputs)]
    slow = [[(codes[i, j] - shift[i, of[j]]) * scale[i, of[j]].double() for j in range(inputs)] for i in range(out)]
    torch.testing.assert_close(term.dense(torch.float64), torch.tensor(slow, dtype=torch.float64), atol=0, rtol=1e-6)
    assert torch.equal(term.integer_codes().long(), codes) and torch.equal(term.scale_matrix(), scale)
    assert torch.equal(term.zero_points().long(), shift)
    stored = bits * out * inputs + (0 if symmetric else bits * out * groups) + 8 * scale.itemsize * out * groups
    assert 0 <= 8 * term.nbytes - stored < 2 * 8 * bits  # two streams of codes, each filled up to a whole word


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_and_the_error_within_half_a_step(bits, symmetric):
    W = normal(6, 50)
    term = IntegerCode.from_matrix(W, bits, 16, symmetric=symmetric, scale_dtype=torch.float32)
    step = term.scale_matrix().repeat_interleave(16, 1)[:, :50]
    zero = term.zero_points().repeat_interleave(16, 1)[:, :50]
    levels = (torch.arange(2**bits) - zero.unsqueeze(-1).float()) * step.unsqueeze(-1)
    least = (levels - W.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((term.dense() - W).abs(), least, atol=1e-6, rtol=1e-5)
    # a zero point is rounded to a whole number too, which moves the range's ends by up to half a step
    assert ((term.dense() - W).abs() <= (0.5 if symmetric else 1.0) * step * (1 + 1e-3)).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_finds_the_best_of_all_ranges(bits, symmetric):
    """The search ends where no smaller range can be better, and not before."""
    groups = grouped(normal(12, 64) * torch.logspace(-3, 1, 12).unsqueeze(1), 32)
    groups[0] = 0
    groups[1, 0, 3] = 40.0
    found = fit(groups, bits, symmetric=symmetric, clip=True)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    grids = [of_range(low * (1 - i / 100), high * (1 - i / 100), bits, symmetric) for i in range(80)]
    errors = [(grid.values(to_codes(groups, grid)) - groups).abs().pow(2.4).sum(-1) for grid in grids]
    error = (found.values(to_codes(groups, found)) - groups).abs().pow(2.4).sum(-1)
    torch.testing.assert_close(error, torch.stack(errors).amin(0), rtol=1e-5, atol=1e-12)


def test_each_group_may_have_its_own_width_and_groups_may_be_tried_in_parts(monkeypatch):
    groups, widths = grouped(normal(21, 64), 32), torch.arange(2, 9).repeat(3)
    for rule in ({}, {"clip": True}, {"symmetric": True}, {"clip": True, "symmetric": True}):
        together = fit(groups, widths.view(-1, 1, 1).expand(21, 2, 1), **rule)
        monkeypatch.setattr("weft.kernels.integer_grid._AT_ONCE", 100)
        for bits in range(2, 9):
            alone = fit(groups[widths == bits], bits, **rule)
            torch.testing.assert_close(together.scale[widths == bits], alone.scale)
            assert torch.equal(together.zero[widths == bits], alone.zero)
        monkeypatch.undo()


def test_clipping_lowers_the_error_that_it_says_it_searches():
    W = normal(8, 64) ** 3
    groups = grouped(W, 32)

    def error(clip):
        grid = fit(groups, 3, clip=clip)
        return (grid.values(to_codes(groups, grid)) - groups).abs().pow(2.4).sum(-1)

    assert (error(True) <= error(False)).all() and error(True).sum() < 0.97 * error(False).sum()


def test_groups_of_zeros_and_zeros_in_groups_are_exact():
    W = normal(4, 32)
    W[1], W[2, ::3] = 0, 0
    for symmetric in (True, False):
        dense = IntegerCode.from_matrix(W, 3, 8, symmetric=symmetric).dense()
        assert (dense[W == 0] == 0).all()


def test_all_dtypes_give_one_matrix_rounded_once():
    """What is computed in 16 bits is the fp32 matrix cast, to the bit."""
    for scale_dtype in (torch.float16, torch.bfloat16):
        term = IntegerCode.from_matrix(normal(8, 40), 8, 16, scale_dtype=scale_dtype)
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(term.dense(dtype), term.dense(torch.float32).to(dtype))


def test_a_cast_of_the_model_rounds_no_scale():
    term = IntegerCode.from_matrix(normal(8, 40), 8, 16)
    wide = term.dense(torch.float32)
    assert torch.equal(term.to(torch.bfloat16).dense(torch.float32), wide)


def test_what_cannot_be_is_refused():
    with pytest.raises(WeftError, match="no integer codes of 9 bits; give 2 to 8"):
        build({"kind": "integer_code", "in_features": 8, "out_features": 8, "bits": 9})
    with pytest.raises(WeftError, match="A group of 0 inputs"):
        IntegerCode(8, 8, group=0)
    with pytest.raises(WeftError, match="cannot be coded: a scale is beyond torch.float16"):
        IntegerCode.from_matrix(normal(4, 8) * 1e8, 4)
