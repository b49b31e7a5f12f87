"""Floating-point codes against torch's own 8-bit casts, the published values of the small formats, and their scales."""

from __future__ import annotations

import pytest
import torch

from weft.errors import WeftError
from weft.kernels.float_format import FORMATS, float_codes, float_values
from weft.terms import FloatCode


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bits_are_those_of_torch(name, dtype):
    largest = FORMATS[name].largest
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(4000, generator=draw) * 10.0**p for p in range(-8, 5)]).clamp(-largest, largest)
    codes = float_codes(x, name)
    assert torch.equal(codes, x.to(dtype).view(torch.uint8))
    assert torch.equal(float_values(codes, name), x.to(dtype).float())


def test_four_bits_have_the_published_values_and_ties_go_to_the_even_mantissa():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(16, dtype=torch.uint8)
    assert float_values(codes, "e2m1").tolist() == values + [-v for v in values]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, -0.75])
    assert float_values(float_codes(ties, "e2m1"), "e2m1").tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1]


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_the_nearest_and_every_number_is_its_own(name):
    unsigned = torch.arange(2 ** (FORMATS[name].bits - 1), dtype=torch.uint8)
    numbers = float_values(unsigned, name)
    usable = numbers[: int((numbers < FORMATS[name].largest).sum()) + 1]
    assert (usable.diff() > 0).all() and usable[-1] == FORMATS[name].largest
    assert torch.equal(float_codes(usable, name), unsigned[: len(usable)])
    x = torch.rand(500, generator=torch.Generator().manual_seed(0)) * FORMATS[name].largest
    nearest = (usable - x.unsqueeze(1)).abs().amin(1)
    torch.testing.assert_close((float_values(float_codes(x, name), name) - x).abs(), nearest)


def test_a_shared_exponent_is_that_of_the_largest_number():
    W = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    W[2, :32] = 0
    term = FloatCode.from_matrix(W, "e2m1", 32)
    for i in range(6):
        for g in range(3):
            part = W[i, 32 * g : 32 * g + 32].abs().max()
            if part:
                assert term.scale_matrix()[i, g] == 2.0 ** (torch.floor(torch.log2(part)) - 2)
    assert (term.dense()[2, :32] == 0).all() and torch.isfinite(term.dense()).all()
    assert term.nbytes == 6 * 70 // 2 + 6 * 3


def test_a_row_scale_maps_the_largest_number_to_the_largest_code():
    W = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    term = FloatCode.from_matrix(W, "e4m3", None, "float32")
    most = W.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(term.dense().gather(1, most), W.gather(1, most))
    assert term.nbytes == 6 * 50 + 4 * 6
    assert ((term.dense() - W).abs() <= W.abs() / 16 + W.abs().amax(1, keepdim=True) / 448 * 2**-10 + 1e-7).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(WeftError, match="no codes of e1m1"):
        FloatCode(8, 8, element="e1m1")
    with pytest.raises(WeftError, match="beyond float16"):
        FloatCode.from_matrix(torch.full((2, 8), 1e9), "e4m3", None, "float16")
