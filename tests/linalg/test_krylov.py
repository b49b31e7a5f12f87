"""Leading eigenvectors and singular triplets of large matrices against dense decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weft.linalg import krylov, svd
from weft.linalg.krylov import leading_eigenvectors, leading_eigh, worthwhile
from weft.linalg.subspace import principal_angles
from weft.linalg.svd import minor_svd, singular_values, truncated_svd

SPECTRA = {
    "flat": lambda k: 1 + 0.5 * (1 - k / len(k)),  # as of fresh random weights
    "root": lambda k: (k + 1) ** -0.5,
    "steep": lambda k: 0.97**k,
    "step": lambda k: torch.where(k < 12, 1.0, 1e-3) * (1 + 1e-3 * torch.cos(k)),
}


def spectrum_of(name: str, size: int) -> Tensor:
    return SPECTRA[name](torch.arange(size).double()).sort(descending=True).values


def matrix(out: int, inn: int, values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    m = min(out, inn)
    U, V = (torch.linalg.qr(torch.randn(n, m, dtype=torch.float64, generator=generator)).Q for n in (out, inn))
    return (U * values) @ V.mT


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(288, 400), (400, 288)])
@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.float64), (10, torch.float32), (60, torch.float64)])
def test_leading_triplets_are_those_of_the_whole_decomposition(
    spectrum: str, shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    W = matrix(*shape, spectrum_of(spectrum, min(shape))).to(dtype)
    U, s, V = truncated_svd(W, rank)
    u, sigma, v = torch.linalg.svd(W.double(), full_matrices=False)
    assert U.dtype == s.dtype == V.dtype == dtype
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    for basis in (U.double(), V.double().mT):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=10 * rounding, rtol=0)
    torch.testing.assert_close(s.double(), sigma[:rank], rtol=max(1e-9, rounding), atol=0)
    error = (W.double() - (U.double() * s.double()) @ V.double()).square().sum()
    assert error.item() == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-6)
    if sigma[rank - 1] - sigma[rank] > 1e-3 * sigma[rank - 1]:
        for found, true in ((U, u[:, :rank]), (V.mT, v[:rank].mT)):
            assert principal_angles(found.double(), true).max() < 1e-4


@pytest.mark.parametrize("rank", [1, 7, 300])
def test_leading_eigenvectors_of_a_covariance_of_few_tokens(rank: int) -> None:
    x = torch.randn(24, 400, generator=torch.Generator().manual_seed(1)).double() * torch.linspace(1, 0.2, 400)
    C = x.mT @ x
    values, Q = leading_eigh(C, rank)
    true = torch.linalg.eigvalsh(C).flip(0)[:rank]
    torch.testing.assert_close(values, true, rtol=1e-9, atol=1e-9 * float(true[0]))
    torch.testing.assert_close(Q.mT @ Q, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(Q.mT @ C @ Q, values.diag(), atol=1e-6 * float(true[0]), rtol=0)


@pytest.mark.parametrize(("tokens", "rank"), [(127, 16), (63, 12), (20, 12)])
def test_vectors_stay_orthonormal_where_the_range_is_exhausted(tokens: int, rank: int) -> None:
    x = torch.randn(tokens, 576, generator=torch.Generator().manual_seed(2)).double() * torch.linspace(1, 0.3, 576)
    C = x.mT @ x
    found = leading_eigenvectors(lambda rows: rows @ C, 576, rank, device=C.device)
    assert found is not None
    values, Q = torch.linalg.eigh(C)
    torch.testing.assert_close(found[0], values.flip(0)[:rank], rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1] @ found[1].mT, torch.eye(rank, dtype=torch.float64))
    assert principal_angles(found[1].mT, Q.flip(1)[:, :rank]).max() < 1e-4


def test_the_iteration_says_when_it_has_not_converged() -> None:
    def found(values: Tensor) -> tuple[Tensor, Tensor] | None:
        return leading_eigenvectors(lambda x: x * values.double(), 300, 5, device=values.device)

    same = found(torch.ones(300))  # any five vectors will do
    assert same is not None and float((same[0] - 1).abs().max()) < 1e-9
    assert found(torch.arange(300) < 3) is None  # there are no five
    assert found(torch.full((300,), float("nan"))) is None


def test_the_same_matrix_gives_the_same_bits() -> None:
    W = matrix(300, 320, spectrum_of("root", 300)).float()
    torch.manual_seed(1)
    first = truncated_svd(W, 6)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(W, 6), strict=True))


@pytest.mark.parametrize("shape", [(288, 300), (300, 288)])
@pytest.mark.parametrize("deficient", [False, True])
def test_minor_triplets_and_values(shape: tuple[int, int], deficient: bool) -> None:
    values = spectrum_of("root", 288)
    values = torch.cat([values[:-4], torch.zeros(4)]) if deficient else values
    W = matrix(*shape, values)
    U, s, V = minor_svd(W, 7)
    torch.testing.assert_close(s, values[-7:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(singular_values(W), values, rtol=1e-9, atol=2e-8)
    for basis in (U, V.mT):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(7, dtype=torch.float64))
    rest = W - (U * s) @ V
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:-7], values[:-7])
    assert torch.linalg.matrix_norm(U.mT @ rest) < 1e-9 and torch.linalg.matrix_norm(rest @ V.mT) < 1e-9


def test_few_directions_of_a_large_matrix_take_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dense decomposition of the size of the matrix, whatever the shape."""
    sizes: list[int] = []
    dense = torch.linalg.eigh

    def counted(G: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(G))
        return dense(G)

    monkeypatch.setattr(krylov.torch.linalg, "eigh", counted)
    monkeypatch.setattr(svd.torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("a whole SVD"))
    assert worthwhile(400, 8) and not worthwhile(400, 60) and not worthwhile(200, 1)
    W = matrix(400, 500, spectrum_of("root", 400))
    with pytest.raises(pytest.fail.Exception, match="a whole SVD"):
        truncated_svd(W, 8)  # of 8 rows, the last step
    assert 0 < len(sizes) < 20 and max(sizes) <= math.ceil(400 / 3)
