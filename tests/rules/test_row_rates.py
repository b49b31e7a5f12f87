"""The factor of a row's step."""

from __future__ import annotations

import torch

from weft.rules.row_rates import row_rates


def test_the_factor_by_norm() -> None:
    norms = torch.tensor([0.0, 0.1, 1.0, 10.0])
    c = row_rates(norms.unsqueeze(1) * torch.tensor([[0.6, 0.8]]), 2.0).squeeze(1)
    torch.testing.assert_close(c, torch.tensor([2.0, 1.69, 0.894, 0.312]), atol=1e-3, rtol=0)
    assert c[0] == 2.0
    many = torch.linspace(0, 10, 50)
    c = row_rates(many.unsqueeze(1), 2.0).squeeze(1)
    assert (c.diff() < 0).all() and ((c * many).diff() > 0).all()


def test_the_norm_is_taken_in_fp32() -> None:
    row = torch.full((1, 4096), 1e-3, dtype=torch.bfloat16)
    exact = (row.double().norm() + 0.25).rsqrt()
    torch.testing.assert_close(row_rates(row, 2.0).double().squeeze(), exact, atol=1e-6, rtol=0)
