"""M-FAC's algebra against dense solves with F and the paper's own recursion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.linalg import fisher_window
from weft.linalg.fisher_window import inverse_fisher, window_coefficients, window_combination, window_dots

M, D, LAM = 16, 200, 1e-3


def rows(m: int = M, d: int = D, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(G: Tensor, damping: float = LAM, count: int | None = None) -> Tensor:
    return damping * torch.eye(G.shape[1], dtype=torch.float64) + G.mT.double() @ G.double() / (count or len(G))


def recursion(G: Tensor, damping: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's static form, row by row: (F^-1 x, diag F^-1, the pivots c)."""
    m, v, c = len(G), [], []
    for g in G:
        v.append(g / damping - sum((b * (b @ g) / a for b, a in zip(v, c, strict=True)), torch.zeros_like(g)))
        c.append(m + g @ v[-1])
    product = x / damping - sum(b * (b @ x) / a for b, a in zip(v, c, strict=True))
    return product, 1 / damping - sum(b.square() / a for b, a in zip(v, c, strict=True)), torch.stack(c)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def solved(G: Tensor, row: int, damping: float = LAM, count: int | None = None) -> Tensor:
    """F^-1 g_row as the optimizer finds it."""
    gram = torch.stack([window_dots(G, g) for g in G])
    return window_combination(G, window_coefficients(gram, count or len(G), damping, row))


@pytest.mark.parametrize("row", [0, 7, M - 1])
def test_all_forms_are_the_dense_solve(row: int) -> None:
    G, x = rows(), rows(1, seed=1)[0]
    inverse = inverse_fisher(G, LAM)
    product, diagonal, pivots = recursion(G, LAM, x)
    assert relative(inverse.product(x), torch.linalg.solve(dense(G), x)) < 1e-11
    assert relative(product, inverse.product(x)) < 1e-11
    assert (inverse.diagonal() - dense(G).inverse().diagonal()).abs().max() < 1e-9
    assert (diagonal - inverse.diagonal()).abs().max() < 1e-9
    assert relative(solved(G, row), torch.linalg.solve(dense(G), G[row])) < 1e-11
    L = torch.linalg.cholesky(M * torch.eye(M, dtype=torch.float64) + G @ G.mT / LAM)
    torch.testing.assert_close(pivots, L.diagonal().square(), rtol=1e-11, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 11), st.floats(1e-3, 10), st.integers(0, 99))
def test_blocks_are_dense_solves_of_their_own(m: int, d: int, block: int, damping: float, seed: int) -> None:
    G, x = rows(m, d, seed), rows(1, d, seed + 1)[0]
    mask = torch.arange(d) // block
    F = dense(G, damping) * (mask.unsqueeze(0) == mask.unsqueeze(1))
    inverse = inverse_fisher(G, damping, block)
    torch.testing.assert_close(inverse.product(x), torch.linalg.solve(F, x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse.diagonal(), F.inverse().diagonal(), rtol=1e-8, atol=1e-8)


def test_block_sizes_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    G, x = rows(), rows(1, seed=1)[0]
    torch.testing.assert_close(inverse_fisher(G, LAM, D + 9).product(x), inverse_fisher(G, LAM).product(x))
    expected = 1 / (LAM + G.square().mean(0))
    torch.testing.assert_close(inverse_fisher(G, LAM, 1).diagonal(), expected)
    monkeypatch.setattr(fisher_window, "_PIECE", {"cpu": 1})  # one block, one column at a time
    torch.testing.assert_close(inverse_fisher(G, LAM, 1).diagonal(), expected)
    assert relative(solved(G, 3), torch.linalg.solve(dense(G), G[3])) < 1e-11


def test_the_order_of_rows_and_empty_rows_do_not_matter() -> None:
    G, order = rows(), torch.randperm(M, generator=torch.Generator().manual_seed(2))
    assert relative(solved(G[order], int((order == 5).nonzero())), solved(G, 5)) < 1e-12
    half = torch.cat([G[:6], torch.zeros(M - 6, D, dtype=G.dtype)])
    assert relative(solved(half, 5, count=6), torch.linalg.solve(dense(G[:6]), G[5])) < 1e-11


def test_between_no_and_full_damping() -> None:
    """F^-1 <= I / lam, g . F^-1 g > 0, and lam F^-1 -> I."""
    G = rows(8, 40)
    inverse = inverse_fisher(G, 0.1)
    whole = torch.stack([inverse.product(e) for e in torch.eye(40, dtype=torch.float64)])
    values = torch.linalg.eigvalsh(whole)
    assert values.min() > 0 and values.max() <= 1 / 0.1 * (1 + 1e-12)
    assert all(G[i] @ solved(G, i, 0.1) > 0 for i in range(8))
    torch.testing.assert_close(1e9 * solved(G, 2, 1e9), G[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
def test_fp32_gradients_do_not_cancel(scale: float) -> None:
    """Where x / lam - (...) would lose all digits, a row of the window keeps fp32's, also among near-copies."""
    G = rows(64, 300)
    G = (scale * (G[:1] + 1e-3 * G) / 300**0.5).float()
    expected = torch.linalg.solve(dense(G, 1e-6), G[9].double())
    naive = (G[9] - G.mT @ torch.linalg.solve(64e-6 * torch.eye(64) + G @ G.mT, G @ G[9])) / 1e-6
    assert relative(solved(G, 9, 1e-6), expected) < 1e-4 < relative(naive, expected)
    assert solved(G, 9, 1e-6).dtype == torch.float32


def test_bf16_rows_are_taken_as_they_are_stored() -> None:
    G = rows(dtype=torch.bfloat16)
    result = solved(G, 4)
    assert result.dtype == torch.float32
    assert relative(result, torch.linalg.solve(dense(G), G[4].double())) < 1e-5


def test_pruning_one_weight_is_the_optimal_surgeon() -> None:
    """dw = -F^-1 z with z_q = w_q / [F^-1]_qq sets w_q to 0 and costs w_q^2 / (2 [F^-1]_qq); no other dw costs less."""
    G, w, q = rows(), rows(1, seed=3)[0], 17
    inverse = inverse_fisher(G, LAM)
    z = torch.zeros(D, dtype=torch.float64)
    z[q] = w[q] / inverse.diagonal()[q]
    dw = -inverse.product(z)
    assert abs(float(w[q] + dw[q])) < 1e-12
    saliency = w[q] ** 2 / (2 * inverse.diagonal()[q])
    torch.testing.assert_close(dw @ dense(G) @ dw / 2, saliency, rtol=1e-9, atol=0)
    other = dw + 0.1 * rows(1, seed=4)[0] * (torch.arange(D) != q)
    assert other @ dense(G) @ other / 2 > saliency


def test_single_precision_is_kept() -> None:
    inverse, ones = inverse_fisher(rows(dtype=torch.float32), LAM, 50), torch.ones(D)
    assert inverse.reduced.dtype == torch.float32 and inverse.reduced.shape == (4, M, 50)
    assert relative(inverse.product(ones), inverse_fisher(rows(), LAM, 50).product(ones)) < 1e-4


@pytest.mark.parametrize(
    ("gradients", "damping", "block"),
    [(rows()[0], 1.0, None), (rows() * torch.nan, 1.0, None), (rows(), 0.0, None), (rows(), 1.0, 0)],
)
def test_refusals(gradients: Tensor, damping: float, block: int | None) -> None:
    with pytest.raises(ValueError, match=r"finite matrix|above 0"):
        inverse_fisher(gradients, damping, block)
