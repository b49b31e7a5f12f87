"""LQ-LoRA's invariants: the errors fall, the weighted step is the minimiser, the formats keep to the budget."""

from __future__ import annotations

import pytest
import torch

from weft.kernels.normal_float import NF4, Format, decode, encode
from weft.linalg.svd import low_rank_factors
from weft.methods.lq_lora import GRID, SHORT_GRID, decompose, fisher_roots

NF2 = Format(bits=2, block=16)


def weight(out_features=48, in_features=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(out_features, 3, generator=g) @ torch.randn(3, in_features, generator=g)
    return torch.randn(out_features, in_features, generator=g) + low


@pytest.mark.parametrize("format", [NF4, NF2])
def test_errors_fall_until_the_stop_and_the_best_is_returned(format):
    W = weight()
    found = decompose(W, 4, format)
    kept = found.errors[:-1] if len(found.errors) > 1 and found.errors[-1] >= min(found.errors[:-1]) else found.errors
    assert kept == sorted(kept, reverse=True) and len(kept) >= 2
    assert float((W - found.code.dense() - found.B @ found.A).norm()) == pytest.approx(found.error, rel=1e-5)
    alone = float((W - decode(encode(W, format), W.shape, format)).norm())
    assert found.error < alone == pytest.approx(decompose(W, 0, format).error, rel=1e-6)


def test_one_iteration_is_qpissa():
    W = weight()
    found = decompose(W, 4, NF4, iterations=1)
    B, A = low_rank_factors(W, 4)
    torch.testing.assert_close(found.B @ found.A, B @ A)
    torch.testing.assert_close(found.code.dense(), decode(encode(W - B @ A), W.shape))


def test_weighted_step_minimises_the_weighted_error():
    g = torch.Generator().manual_seed(1)
    W = weight()
    rows, columns = torch.rand(48, generator=g) + 0.01, torch.rand(32, generator=g) + 0.01
    a, b = fisher_roots({"fisher_rows": rows, "fisher_columns": columns})
    torch.testing.assert_close(a / a[0], (rows / rows[0]).sqrt())
    exact = Format(bits=8, block=16, scale_bits=None)  # nearly no code: the factors' error alone is compared

    def error(weights):
        found = decompose(W, 3, exact, weights=weights, iterations=1)
        return float((a.unsqueeze(1) * (W - found.B @ found.A) * b).norm())

    s = torch.linalg.svdvals(a.unsqueeze(1) * W * b)
    assert error((a, b)) == pytest.approx(float(s[3:].norm()), rel=1e-4) and error((a, b)) < 0.99 * error(None)
    ones = torch.ones(48), torch.ones(32)
    plain, weighted = decompose(W, 3, NF4), decompose(W, 3, NF4, weights=ones)
    torch.testing.assert_close(plain.B @ plain.A, weighted.B @ weighted.A, rtol=1e-4, atol=1e-4)


def test_dead_rows_and_columns_do_not_divide_by_zero():
    rows, columns = torch.ones(48), torch.ones(32)
    rows[3] = columns[5] = 0
    found = decompose(weight(), 3, NF4, weights=fisher_roots({"fisher_rows": rows, "fisher_columns": columns}))
    assert found.B.isfinite().all() and found.A.isfinite().all()


def test_the_grid_is_the_papers():
    assert len(GRID) == len(set(GRID)) == 432 and set(SHORT_GRID) <= set(GRID) and NF4 in GRID
    assert Format(3, 64, 8, 256).bits_per_weight == pytest.approx(3.127, abs=5e-4)


def test_more_bits_less_error():
    errors = [decompose(weight(), 4, Format(bits=b)).error for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
