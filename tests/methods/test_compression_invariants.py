"""The invariants of every compression method, through `METHOD.factorise`: the error that each one minimises."""

from __future__ import annotations

import inspect as signatures

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.errors import WeftError
from weft.methods import METHODS
from weft.methods.base import Factors, LowRankSplit, Method, low_rank_terms
from weft.terms import LowRank
from weft.terms.put import put

COMPRESS = {n: m for n, m in METHODS.items() if m.kind == "compress" and isinstance(m.split, LowRankSplit)}
SHAPES = [(6, 10), (10, 6), (8, 8)]
TOKENS = 300


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Data:
    """A weight with inputs, output gradients and Fisher information, and the moments made of them."""

    def __init__(self, shape: tuple[int, int], mean: float = 1.0, tokens: int = TOKENS) -> None:
        out, inn = shape
        self.W, self.b = normal(out, inn), normal(out, seed=9)
        scales = torch.logspace(0.5, -0.5, inn, dtype=torch.float64)
        self.x = (normal(tokens, inn, seed=1) @ normal(inn, inn, seed=2) * scales) + mean * normal(inn, seed=3)
        self.g = normal(tokens, out, seed=4) @ normal(out, out, seed=5)
        self.fisher = normal(out, inn, seed=6).square() * torch.logspace(2, -2, inn, dtype=torch.float64)
        self.moments = {
            "input_moment": self.x.mT @ self.x / tokens,
            "input_mean": self.x.mean(0),
            "input_abs_mean": self.x.abs().mean(0),
            "output_grad_moment": self.g.mT @ self.g / tokens,
            "fisher_rows": self.fisher.sum(1),
            "fisher_columns": self.fisher.sum(0),
        }

    def factorise(self, method: str, **options: object) -> Factors:
        chosen = METHODS[method]
        assert isinstance(chosen.split, LowRankSplit)
        return chosen.split.factorise(self.W, {need: self.moments[need] for need in chosen.needs}, **options)


def low_rank(factors: Factors, rank: int) -> Tensor:
    kept = factors.truncate(rank)
    return kept.B @ kept.A


def svd(W: Tensor, rank: int) -> Tensor:
    u, s, v = np.linalg.svd(W.numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank])


def tail(M: Tensor, rank: int) -> float:
    return float((np.linalg.svd(M.numpy(), compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize("name", COMPRESS)
def test_defaults_are_those_of_the_function(name: str) -> None:
    method = COMPRESS[name]
    assert isinstance(method.split, LowRankSplit)
    parameters = signatures.signature(method.split.factorise).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == dict(method.defaults)


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(name: str, shape: tuple[int, int]) -> None:
    """Full rank is the weight, components fall, sizes are even, fp64 throughout, and the weight is left alone."""
    data = Data(shape)
    before = data.W.clone()
    factors = data.factorise(name)
    assert torch.equal(data.W, before)
    m = min(shape)
    assert factors.B.shape == (shape[0], m) and factors.A.shape == (m, shape[1]) and factors.s.shape == (m,)
    assert factors.B.dtype == factors.A.dtype == torch.float64
    assert (factors.s.diff() <= 1e-12 * factors.s[0]).all()
    torch.testing.assert_close(factors.B @ factors.A, data.W, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(factors.B.norm(dim=0), factors.A.norm(dim=1))


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_channels_give_finite_factors(name: str, shape: tuple[int, int]) -> None:
    data = Data(shape, tokens=3)
    factors = data.factorise(name)
    assert torch.isfinite(factors.B).all() and torch.isfinite(factors.A).all() and torch.isfinite(factors.s).all()


@pytest.mark.parametrize("name", ["svd", "welore"])
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_eckart_young_with_the_size_shared(name: str, shape: tuple[int, int]) -> None:
    data = Data(shape)
    factors = data.factorise(name)
    torch.testing.assert_close(low_rank(factors, 3), svd(data.W, 3), rtol=1e-9, atol=1e-9)
    assert (data.W - low_rank(factors, 3)).square().sum().item() == pytest.approx(tail(data.W, 3), rel=1e-9)
    r = factors.truncate(3)
    torch.testing.assert_close(r.B.mT @ r.B, torch.diag(r.s), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(r.A @ r.A.mT, torch.diag(r.s), atol=1e-9, rtol=1e-9)


# svd-llm


def output_error(data: Data, W: Tensor) -> float:
    return float(((data.W - W) @ data.x.mT).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [4, TOKENS])
def test_svd_llm_loses_what_it_drops(shape: tuple[int, int], tokens: int) -> None:
    data = Data(shape, tokens=tokens)
    error = output_error(data, low_rank(data.factorise("svd-llm", ridge=0.0), 2))
    assert error == pytest.approx(tail(data.W @ data.x.mT, 2), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_is_never_above_the_others_in_its_norm(shape: tuple[int, int]) -> None:
    data = Data(shape)
    for rank in (1, 3, 5):
        best = output_error(data, low_rank(data.factorise("svd-llm", ridge=0.0), rank))
        for other in ("svd", "asvd", "fwsvd", "kfac-svd"):
            assert best <= output_error(data, low_rank(data.factorise(other), rank)) * (1 + 1e-9)


def test_svd_llm_with_white_inputs_is_the_svd() -> None:
    data = Data((6, 10))
    data.moments["input_moment"] = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(low_rank(data.factorise("svd-llm"), 3), svd(data.W, 3))


@pytest.mark.parametrize("name", ["svd-llm", "kfac-svd", "afm", "asvd", "fwsvd"])
def test_a_ridge_is_relative(name: str) -> None:
    """Multiplying every moment by a constant (more tokens, another loss scale) leaves the answer."""
    data, scaled = Data((6, 10)), Data((6, 10))
    for need, moment in scaled.moments.items():
        c = 1e3 if need in ("input_mean", "input_abs_mean") else 1e6
        scaled.moments[need] = c * moment
    a, b = (low_rank(d.factorise(name), 3) for d in (data, scaled))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


# kfac-svd


def fisher_error(data: Data, W: Tensor, ridge: float) -> float:
    X, G = (
        moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        for moment in (data.moments["input_moment"], data.moments["output_grad_moment"])
    )
    D = W - data.W
    return float(torch.trace(D.mT @ G @ D @ X))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_kfac_svd_loses_what_it_drops_and_no_more(shape: tuple[int, int], rank: int) -> None:
    data = Data(shape)
    factors = data.factorise("kfac-svd", ridge=1e-4)
    least = fisher_error(data, low_rank(factors, rank), 1e-4)
    assert least == pytest.approx(float(factors.s[rank:].square().sum()), rel=1e-8)
    B, A, _ = factors.truncate(rank)[:3]
    for seed in range(50):
        size = 10.0 ** -(seed % 4)
        other = (B + size * normal(*B.shape, seed=seed)) @ (A + size * normal(*A.shape, seed=seed + 99))
        assert fisher_error(data, other, 1e-4) >= least * (1 - 1e-10)
    for name in ("svd", "svd-llm", "asvd", "fwsvd"):
        assert fisher_error(data, low_rank(data.factorise(name), rank), 1e-4) >= least * (1 - 1e-10)


def test_kfac_svd_with_white_gradients_is_svd_llm() -> None:
    data = Data((6, 10))
    data.moments["output_grad_moment"] = torch.eye(6, dtype=torch.float64)
    a, b = data.factorise("kfac-svd", ridge=1e-4), data.factorise("svd-llm", ridge=1e-4)
    torch.testing.assert_close(low_rank(a, 3), low_rank(b, 3), rtol=1e-9, atol=1e-9)
    data.moments["input_moment"] = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(low_rank(data.factorise("kfac-svd"), 3), svd(data.W, 3))


def test_kfac_svd_turns_with_the_inputs_and_grows_with_the_gradient() -> None:
    data, turned, louder = Data((6, 10)), Data((6, 10)), Data((6, 10))
    Q = torch.linalg.qr(normal(10, 10, seed=8)).Q
    turned.W, turned.moments["input_moment"] = data.W @ Q.mT, Q @ data.moments["input_moment"] @ Q.mT
    louder.moments["output_grad_moment"] = 9 * data.moments["output_grad_moment"]
    plain, rotated, scaled = (d.factorise("kfac-svd", ridge=0.0) for d in (data, turned, louder))
    torch.testing.assert_close(low_rank(rotated, 3), low_rank(plain, 3) @ Q.mT, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(rotated.s, plain.s, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(scaled.s, 3 * plain.s, rtol=1e-7, atol=1e-9)


# asvd


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_asvd_is_the_svd_of_scaled_columns(alpha: float) -> None:
    data = Data((6, 10))
    S = data.moments["input_abs_mean"] ** alpha
    expected = svd(data.W * S, 3) / S
    found = low_rank(data.factorise("asvd", alpha=alpha), 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # the published 1e-6 on the scale
    error = ((data.W - found) * S).square().sum().item()
    assert error == pytest.approx(tail(data.W * S, 3), rel=1e-5)


def test_asvd_without_scaling_is_the_svd() -> None:
    data = Data((6, 10))
    torch.testing.assert_close(low_rank(data.factorise("asvd", alpha=0.0), 3), svd(data.W, 3))
    data.moments["input_abs_mean"] = torch.full((10,), 7.0)
    torch.testing.assert_close(low_rank(data.factorise("asvd"), 3), svd(data.W, 3))


def test_asvd_with_root_mean_squares_is_svd_llm_on_a_diagonal_moment() -> None:
    data = Data((6, 10))
    diagonal = data.moments["input_moment"].diagonal()
    data.moments["input_moment"] = torch.diag(diagonal)
    data.moments["input_abs_mean"] = diagonal.sqrt()
    a, b = data.factorise("asvd", alpha=1.0), data.factorise("svd-llm", ridge=1e-6)
    torch.testing.assert_close(low_rank(a, 3), low_rank(b, 3), rtol=1e-8, atol=1e-9)


def test_asvd_survives_a_channel_that_never_fires() -> None:
    data = Data((6, 10))
    data.moments["input_abs_mean"][4] = 0
    assert torch.isfinite(low_rank(data.factorise("asvd"), 3)).all()


# fwsvd


def weighted_error(data: Data, W: Tensor, axis: str) -> float:
    f = data.moments["fisher_columns"] if axis == "input" else data.moments["fisher_rows"].unsqueeze(1)
    return float((f * (data.W - W).square()).sum())


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_loses_what_it_drops_and_no_more(shape: tuple[int, int], axis: str) -> None:
    data = Data(shape)
    f = data.moments["fisher_columns"] if axis == "input" else data.moments["fisher_rows"].unsqueeze(1)
    factors = data.factorise("fwsvd", axis=axis, floor=1e-12)
    least = weighted_error(data, low_rank(factors, 3), axis)
    assert least == pytest.approx(tail(data.W * f.sqrt(), 3), rel=1e-9)
    assert least <= weighted_error(data, svd(data.W, 3), axis)
    B, A, _ = factors.truncate(3)[:3]
    for seed in range(200):
        size = 10.0 ** -(seed % 5)
        other = (B + size * normal(*B.shape, seed=seed)) @ (A + size * normal(*A.shape, seed=seed + 999))
        assert weighted_error(data, other, axis) >= least * (1 - 1e-10)


def test_fwsvd_with_constant_importance_is_the_svd() -> None:
    data = Data((6, 10))
    data.moments["fisher_columns"] = torch.full((10,), 3.0)
    torch.testing.assert_close(low_rank(data.factorise("fwsvd"), 3), svd(data.W, 3))


def test_fwsvd_output_axis_is_the_input_axis_of_the_transpose() -> None:
    data, turned = Data((6, 10)), Data((10, 6))
    turned.W, turned.moments["fisher_columns"] = data.W.mT, data.moments["fisher_rows"]
    a, b = data.factorise("fwsvd", axis="output"), turned.factorise("fwsvd", axis="input")
    torch.testing.assert_close(low_rank(a, 3), low_rank(b, 3).mT, rtol=1e-9, atol=1e-9)


def test_fwsvd_may_get_a_worthless_column_wrong_but_not_infinite() -> None:
    data = Data((6, 10))
    data.moments["fisher_columns"][4] = 0
    found = low_rank(data.factorise("fwsvd"), 3)
    assert torch.isfinite(found).all()
    assert found[:, 4].norm() < 1e3 * data.W.norm()


def test_fwsvd_knows_two_axes() -> None:
    with pytest.raises(WeftError, match="axis is 'input' or 'output', not 'rows'"):
        Data((6, 10)).factorise("fwsvd", axis="rows")


# afm


def affine_error(data: Data, factors: Factors, rank: int) -> float:
    """Mean squared error of the layer's outputs, with the bias that the mean asks for."""
    W = low_rank(factors, rank)
    b = data.b if factors.mean is None else data.b + (data.W - W) @ factors.mean
    return float(((data.x @ data.W.mT + data.b) - (data.x @ W.mT + b)).square().sum() / len(data.x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_afm_loses_the_dropped_eigenvalues_of_the_output_covariance(shape: tuple[int, int], rank: int) -> None:
    data = Data(shape, mean=5.0)
    y = data.x @ data.W.mT + data.b
    values = np.linalg.eigvalsh(np.cov(y.numpy().T, bias=True))[::-1]
    found = affine_error(data, data.factorise("afm", ridge=0.0), rank)
    assert found == pytest.approx(values[rank:].clip(min=0).sum(), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_afm_is_the_published_projection(shape: tuple[int, int]) -> None:
    """y' = U U^T (W x + b) + (I - U U^T) m, written out from streamed outputs."""
    data = Data(shape, mean=5.0)
    y = data.x @ data.W.mT + data.b
    m = y.mean(0)
    U = torch.from_numpy(np.linalg.eigh(np.cov(y.numpy().T, bias=True))[1][:, ::-1][:, :3].copy())
    expected = y @ U @ U.mT + m - U @ U.mT @ m
    factors = data.factorise("afm", ridge=0.0)
    W = low_rank(factors, 3)
    assert factors.mean is not None
    found = data.x @ W.mT + data.b + (data.W - W) @ factors.mean
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_afm_is_better_than_uncentred_components() -> None:
    data = Data((6, 10), mean=5.0)
    assert affine_error(data, data.factorise("afm"), 2) < affine_error(data, data.factorise("svd-llm"), 2) * 0.999
    uncentred = data.factorise("afm", bias=False, ridge=1e-4)
    assert uncentred.mean is None
    torch.testing.assert_close(
        low_rank(uncentred, 3), low_rank(data.factorise("svd-llm", ridge=1e-4), 3), rtol=1e-9, atol=1e-9
    )


def test_afm_on_centred_inputs_is_svd_llm() -> None:
    data = Data((6, 10))
    data.x = data.x - data.x.mean(0)
    data.moments["input_moment"], data.moments["input_mean"] = data.x.mT @ data.x / TOKENS, data.x.mean(0)
    a, b = data.factorise("afm", ridge=1e-4), data.factorise("svd-llm", ridge=1e-4)
    torch.testing.assert_close(low_rank(a, 3), low_rank(b, 3), rtol=1e-8, atol=1e-9)


def test_afm_at_full_rank_is_the_layer_on_any_input() -> None:
    data = Data((6, 10), mean=5.0)
    factors = data.factorise("afm")
    assert factors.mean is not None
    correction = (data.W - low_rank(factors, 6)) @ factors.mean
    torch.testing.assert_close(low_rank(factors, 6), data.W)
    assert correction.abs().max() < 1e-9


# welore


def test_welore_trains_the_low_rank_components_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 6), torch.nn.Linear(6, 10), torch.nn.Linear(10, 10))
    put(model, "2", {"low_rank": LowRank.from_factors(torch.zeros(10, 2), torch.zeros(2, 10))}, model[2].bias)
    trained = METHODS["welore"].freeze(model)
    assert sum(p.numel() for p in trained) == 2 * (10 + 10)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "2.terms.low_rank.A",
        "2.terms.low_rank.B",
    }
    assert trained == low_rank_terms(model)
    with pytest.raises(WeftError, match="'welore' finds nothing to train in this model; compress it first"):
        METHODS["welore"].freeze(torch.nn.Linear(2, 2))


def test_full_trains_everything() -> None:
    model = torch.nn.Linear(2, 3)
    assert len(METHODS["full"].freeze(model)) == 2


@pytest.mark.parametrize("name", COMPRESS)
def test_records_name_a_paper_and_known_statistics(name: str) -> None:
    method: Method = COMPRESS[name]
    record = method.record()
    assert record["paper"] and record["summary"].endswith(".") and record["allocate"] == method.allocate
