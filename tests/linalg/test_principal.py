"""The kernel of data-aware truncation against whitened SVDs written out in numpy, and against its own optimality."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.linalg.principal import even_split, principal_factors, tail_losses
from weft.linalg.svd import truncated_svd

SHAPES = [(6, 10), (10, 6), (8, 8)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int, tokens: int = 200) -> Tensor:
    """Of correlated inputs with uneven scales."""
    x = normal(tokens, size, seed=seed) @ normal(size, size, seed=seed + 100) * torch.logspace(0, -1, size)
    return x.mT @ x / tokens


def loss(D: Tensor, M: Tensor, C: Tensor) -> Tensor:
    return torch.trace(D.mT @ M @ D @ C)


def whitened(W: Tensor, C: Tensor, M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W' and s by Cholesky whitening on both sides, with explicit inverses (numpy)."""
    R, L = np.linalg.cholesky(C.numpy()), np.linalg.cholesky(M.numpy())
    u, s, v = np.linalg.svd(L.T @ W.numpy() @ R, full_matrices=False)
    kept = np.linalg.inv(L.T) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(R)
    return torch.from_numpy(kept), torch.from_numpy(s)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("two_sided", [False, True])
def test_equals_the_cholesky_route(shape: tuple[int, int], two_sided: bool) -> None:
    W, C = normal(*shape), moment(shape[1], 1)
    M = moment(shape[0], 2) if two_sided else None
    B, A, s = principal_factors(W, C, M)
    expected, sigma = whitened(W, C, torch.eye(shape[0], dtype=torch.float64) if M is None else M, 3)
    torch.testing.assert_close(B[:, :3] @ A[:3], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s, sigma, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_eigen_route(shape: tuple[int, int]) -> None:
    W, C = normal(*shape), moment(shape[1], 1)
    values, Q = np.linalg.eigh(C.numpy())
    u, s, v = np.linalg.svd(W.numpy() @ Q * np.sqrt(values), full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ v[:3] / np.sqrt(values) @ Q.T
    B, A, _ = principal_factors(W, C)
    np.testing.assert_allclose((B[:, :3] @ A[:3]).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_the_dropped_part_of_the_spectrum(shape: tuple[int, int], rank: int) -> None:
    W, C, M = normal(*shape), moment(shape[1], 1), moment(shape[0], 2)
    B, A, s = principal_factors(W, C, M, ridge=1e-3)
    eye_in, eye_out = torch.eye(shape[1]).double(), torch.eye(shape[0]).double()
    C, M = C + 1e-3 * C.diagonal().mean() * eye_in, M + 1e-3 * M.diagonal().mean() * eye_out
    found = loss(W - B[:, :rank] @ A[:rank], M, C)
    torch.testing.assert_close(found, s[rank:].square().sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_matrix_of_the_rank_is_better(shape: tuple[int, int]) -> None:
    W, C, M = normal(*shape), moment(shape[1], 1), moment(shape[0], 2)
    B, A, _ = principal_factors(W, C, M)
    B, A = B[:, :3], A[:3]
    best = loss(W - B @ A, M, C)
    for seed in range(200):
        size = 10.0 ** -(seed % 5)
        other = (B + size * normal(*B.shape, seed=seed)) @ (A + size * normal(*A.shape, seed=seed + 1000))
        assert loss(W - other, M, C) >= best * (1 - 1e-12)
    U, s, V = truncated_svd(W, 3)
    assert loss(W - (U * s) @ V, M, C) > best


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["none", "diagonal", "full"])
def test_full_rank_is_the_weight(shape: tuple[int, int], metric: str) -> None:
    W = normal(*shape)
    C, M = moment(shape[1], 1), moment(shape[0], 2)
    chosen = {"none": (None, None), "diagonal": (C.diagonal(), M.diagonal()), "full": (C, M)}[metric]
    B, A, s = principal_factors(W, *chosen)
    assert B.shape == (shape[0], min(shape)) and A.shape == (min(shape), shape[1]) and s.shape == (min(shape),)
    torch.testing.assert_close(B @ A, W, rtol=1e-8, atol=1e-9)
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_channels(shape: tuple[int, int]) -> None:
    W, x = normal(*shape), normal(4, shape[1], seed=7)
    B, A, _ = principal_factors(W, x.mT @ x)
    assert torch.isfinite(B).all() and torch.isfinite(A).all()
    tail = np.linalg.svd((W @ x.mT).numpy(), compute_uv=False)[2:]
    found = ((W - B[:, :2] @ A[:2]) @ x.mT).square().sum()
    assert found.item() == pytest.approx((tail**2).sum(), rel=1e-9)
    torch.testing.assert_close(B @ A @ x.mT, W @ x.mT)  # full rank: exact on the data
    assert torch.linalg.matrix_norm(B[:, :2] @ A[:2], 2) <= torch.linalg.matrix_norm(W, 2) * (1 + 1e-12)


def test_singular_output_metric() -> None:
    W, g = normal(6, 8), normal(3, 6, seed=4)
    M = g.mT @ g
    B, A, s = principal_factors(W, None, M)
    assert torch.isfinite(B).all()
    assert s[3:].max() < 1e-6 * s[0]
    torch.testing.assert_close(g @ B @ A, g @ W)


def test_a_dead_output_ranks_last_and_stays_finite() -> None:
    W, M = normal(6, 8), moment(6, 2)
    M[2], M[:, 2] = 0, 0
    B, A, _ = principal_factors(W, moment(8, 1), M, ridge=1e-4)
    kept = B[:, :3] @ A[:3]
    assert torch.isfinite(kept).all()
    relative = (W - kept).norm(dim=1) / W.norm(dim=1)
    assert relative[2] > relative[[0, 1, 3, 4, 5]].mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_metrics_give_the_plain_svd(shape: tuple[int, int]) -> None:
    W = normal(*shape)
    U, s, V = truncated_svd(W, 3)
    for C in (None, torch.eye(shape[1]), torch.ones(shape[1])):
        for M in (None, torch.eye(shape[0]), torch.ones(shape[0])):
            B, A, found = principal_factors(W, C, M)
            torch.testing.assert_close(B[:, :3] @ A[:3], (U * s) @ V, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found[:3], s)


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_metric_equals_the_full_one(shape: tuple[int, int]) -> None:
    W, c, m = normal(*shape), normal(shape[1], seed=1).square() + 0.1, normal(shape[0], seed=2).square() + 0.1
    flat, full = principal_factors(W, c, m), principal_factors(W, torch.diag(c), torch.diag(m))
    torch.testing.assert_close(flat[0][:, :3] @ flat[1][:3], full[0][:, :3] @ full[1][:3], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(flat[2], full[2], rtol=1e-7, atol=1e-9)


@given(st.sampled_from(SHAPES), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_rotating_the_inputs_rotates_the_answer(shape: tuple[int, int], seed: int) -> None:
    W, C, M = normal(*shape, seed=seed), moment(shape[1], 1), moment(shape[0], 2)
    Q = torch.linalg.qr(normal(shape[1], shape[1], seed=seed)).Q
    B, A, s = principal_factors(W, C, M)
    rotated = principal_factors(W @ Q.mT, Q @ C @ Q.mT, M)
    torch.testing.assert_close(rotated[0][:, :2] @ rotated[1][:2], B[:, :2] @ A[:2] @ Q.mT, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotated[2], s, rtol=1e-6, atol=1e-8)


@given(st.sampled_from(SHAPES), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_scaling_a_metric_scales_the_spectrum_alone(shape: tuple[int, int], c: float, m: float) -> None:
    W, C, M = normal(*shape), moment(shape[1], 1), moment(shape[0], 2)
    B, A, s = principal_factors(W, C, M, ridge=1e-4)
    B2, A2, s2 = principal_factors(W, c * C, m * M, ridge=1e-4)
    torch.testing.assert_close(B2[:, :3] @ A2[:3], B[:, :3] @ A[:3], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(s2 / (c * m) ** 0.5, s, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e150, 1e-150])
@pytest.mark.parametrize("which", ["weight", "inputs", "outputs"])
def test_huge_and_tiny_norms(shape: tuple[int, int], scale: float, which: str) -> None:
    W, C, M = normal(*shape), moment(shape[1], 1), moment(shape[0], 2)
    B, A, s = principal_factors(W, C, M)
    kept = B[:, :3] @ A[:3]
    w, c, m = (scale if which == part else 1.0 for part in ("weight", "inputs", "outputs"))
    B, A, t = principal_factors(W * w, C * c, M * m)
    torch.testing.assert_close(B[:, :3] @ A[:3] / w, kept, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(t / (w * (c * m) ** 0.5), s, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    for C in (None, torch.eye(shape[1]), torch.ones(shape[1])):
        for M in (None, torch.eye(shape[0]), torch.ones(shape[0])):
            B, A, s = principal_factors(torch.empty(shape), C, M, ridge=1e-4)
            assert (B.shape, A.shape, s.shape) == ((shape[0], 0), (0, shape[1]), (0,))


def test_zero_weights_give_zero_factors() -> None:
    B, A, s = principal_factors(torch.zeros(4, 6), moment(6, 1), moment(4, 2))
    assert not (B @ A).any() and not s.any() and torch.isfinite(B).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_metrics_stay_finite(shape: tuple[int, int]) -> None:
    for C in (torch.zeros(shape[1], shape[1]), torch.zeros(shape[1])):
        B, A, s = principal_factors(normal(*shape), C, ridge=1e-4)
        assert torch.isfinite(B @ A).all() and s.max() < 1e-100


def test_bfloat16_and_strided_inputs() -> None:
    W, C = normal(12, 20).bfloat16()[::2, ::2], moment(20, 1).float()[::2, ::2]
    B, A, _ = principal_factors(W, C)
    expected = principal_factors(W.double().contiguous(), C.double().contiguous())
    assert B.dtype == torch.float64
    torch.testing.assert_close(B @ A, expected[0] @ expected[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_metric_is_refused(shape: tuple[int, int], bad: float) -> None:
    for metric in (moment(shape[1], 1), torch.ones(shape[1], dtype=torch.float64)):
        metric[0] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            principal_factors(normal(*shape), metric)


def test_even_split_balances_without_changing_the_product() -> None:
    B, A = normal(5, 4), normal(4, 7, seed=1) * torch.tensor([1e3, 1.0, 1e-3, 0.0]).unsqueeze(1)
    b, a = even_split(B, A)
    torch.testing.assert_close(b @ a, B @ A)
    torch.testing.assert_close(b.norm(dim=0)[:3], a.norm(dim=1)[:3])


@pytest.mark.parametrize("shape", SHAPES)
def test_tail_losses_are_the_losses_of_every_truncation(shape: tuple[int, int]) -> None:
    """Also for components that are not orthogonal in this norm."""
    W, C, M = normal(*shape), moment(shape[1], 1), moment(shape[0], 2)
    U, s, V = truncated_svd(W)
    tails = tail_losses(U * s, V, C, M)
    assert tails.shape == (min(shape) + 1,)
    for rank in range(min(shape) + 1):
        expected = loss(W - (U[:, :rank] * s[:rank]) @ V[:rank], M, C)
        assert tails[rank].item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    B, A, values = principal_factors(W, C, M)
    own = tail_losses(B, A, C, M)[:-1]
    torch.testing.assert_close(own, values.square().flip(0).cumsum(0).flip(0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("metric", ["none", "diagonal", "full"])
def test_the_first_components_alone_are_those_of_all(shape: tuple[int, int], metric: str) -> None:
    draw = torch.Generator().manual_seed(5)
    W, x = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in (shape, (40, shape[1])))
    C = {"none": None, "diagonal": x.square().mean(0), "full": x.mT @ x / 40}[metric]
    B, A, s = principal_factors(W, C=C)
    few = principal_factors(W, C=C, rank=3)
    assert few[0].shape == (shape[0], 3) and few[1].shape == (3, shape[1])
    torch.testing.assert_close(few[0] @ few[1], B[:, :3] @ A[:3])
    torch.testing.assert_close(few[2], s)
