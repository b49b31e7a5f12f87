"""dsformer: dictionaries with sparse coefficients, against loops and closed forms, and what they store."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.allocate import Shape
from weft.errors import WeftError
from weft.linalg.principal import principal_factors
from weft.methods import dsformer
from weft.methods.dsformer import code, dictionary, factorise, sizes
from weft.terms import DenseSparse


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def metric(inn: int) -> Tensor:
    x = normal(200, inn, seed=7) @ normal(inn, inn, seed=8)
    return x.mT @ x / 200


def product(D: Tensor, values: Tensor, places: Tensor) -> Tensor:
    return values.new_zeros(len(values), len(D)).scatter(1, places, values) @ D


def error(W: Tensor, C: Tensor, made: tuple[Tensor, Tensor, Tensor]) -> float:
    missing = W - product(*made)
    return float(((missing @ C) * missing).sum())


def pursued(W: Tensor, D: Tensor, C: Tensor, k: int) -> np.ndarray:
    """Orthogonal matching pursuit of each row, an atom at a time, in coordinates where the metric is the identity."""
    root = np.linalg.cholesky(C.numpy())
    atoms = D.numpy() @ root
    made = []
    for row in W.numpy() @ root:
        chosen: list[int] = []
        left = row
        for _ in range(k):
            worth = [-1.0 if j in chosen else abs(left @ atom) / np.linalg.norm(atom) for j, atom in enumerate(atoms)]
            chosen.append(int(np.argmax(worth)))
            weights, *_ = np.linalg.lstsq(atoms[chosen].T, row, rcond=None)
            left = row - weights @ atoms[chosen]
        made.append(weights @ D.numpy()[chosen])
    return np.array(made)


def test_one_atom_at_a_time_is_orthogonal_matching_pursuit() -> None:
    W, D, C = normal(6, 10), normal(8, 10, seed=1), metric(10)
    made = product(D, *code(W, D, C, 3, steps=3))
    np.testing.assert_allclose(made.numpy(), pursued(W, D, C, 3), atol=1e-4)


@pytest.mark.parametrize("k", [4, 20, 39])
def test_weights_of_chosen_atoms_are_least_squares(k: int) -> None:
    """Of few atoms, of many, and in a metric of few directions, in which conjugate gradients do not settle."""
    W, D = normal(30, 48), normal(40, 48, seed=1)
    places = torch.rand(30, 40, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :k]
    flat = torch.logspace(0, -9, 48, dtype=torch.float64).diag()
    for C in (metric(48) + 0.1 * torch.eye(48).double(), flat):
        gram, alike = D @ C @ D.mT, W @ C @ D.mT
        found = dsformer._fitted(gram, alike, places, torch.zeros(30, k).double())
        ridge = dsformer._LEAST * gram.diagonal().mean() * torch.eye(40).double()
        for row, own in zip(range(30), places, strict=True):
            exact = torch.linalg.solve((gram + ridge)[own][:, own], alike[row, own])
            torch.testing.assert_close(found[row], exact, rtol=1e-6, atol=1e-8)


def test_many_weights_are_found_without_a_factorisation_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes k^3 / 3 operations a row where these take a few products with m x m."""
    called = []
    solved = dsformer._solved
    monkeypatch.setattr(dsformer, "_solved", lambda *args: (called.append(args[2].shape), solved(*args))[1])
    W, C = normal(60, 48), torch.eye(48).double()
    _, A, _ = principal_factors(W, C=C)
    factorise(W, C, A[:40], 20, rounds=2)
    assert all(shape[0] < 6 or shape[1] ** 2 <= 160 for shape in called)


def test_a_planted_dictionary_is_used_as_it_was_and_mended_where_an_atom_is_missing() -> None:
    D = normal(12, 16, seed=1)
    D = D / D.norm(dim=1, keepdim=True)
    places = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:2] for i in range(40)])
    W = product(D, normal(40, 2, seed=3).sign() + normal(40, 2, seed=4) / 4, places)
    _, found = code(W, D, torch.eye(16).double(), 2, steps=2)
    assert (found.sort(1).values == places.sort(1).values).all(1).double().mean() > 0.9
    exact = torch.linalg.lstsq(D.mT, W.mT).solution.mT.gather(1, places)
    torch.testing.assert_close(dictionary(W, exact, places, 12, torch.eye(16).double()), D, atol=1e-8, rtol=0)
    unused = dictionary(W, exact[:, :1], places[:, :1] * 0, 12, torch.eye(16).double())
    assert bool((unused.norm(dim=1) > 0).all()), "an atom that no row uses is given to the rows that lack most"


def test_rounds_never_lose_and_all_atoms_are_the_truncated_svd() -> None:
    W, C = normal(24, 16), metric(16)
    _, A, s = principal_factors(W, C=C)
    errors = [error(W, C, factorise(W, C, A[:8], 3, rounds=n)) for n in range(5)]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors)) and errors[-1] < 0.9 * errors[0]
    whole = error(W, C, factorise(W, C, A[:8], 8, rounds=3))
    assert whole == pytest.approx(float((s[8:] ** 2).sum()), rel=1e-4)


def test_rows_of_several_subspaces_are_better_than_low_rank_at_the_same_bytes_and_others_not() -> None:
    C, shape = torch.eye(32).double(), Shape(96, 32, 2)
    planes = [normal(2, 32, seed=i) for i in range(8)]
    union = torch.cat([normal(12, 2, seed=20 + i) @ plane for i, plane in enumerate(planes)])
    one = normal(96, 12, seed=1) @ normal(12, 32, seed=2)
    options = {"share": 0.125}
    atoms, nbytes = next((m, n) for m, n in sizes(shape, options) if m >= 16)
    rank = nbytes // (2 * (96 + 32))
    for W, better in ((union, True), (one, False)):
        _, A, s = principal_factors(W, C=C)
        sparse = error(W, C, factorise(W, C, A[:atoms], 2, rounds=20, steps=2))
        assert (sparse < 0.5 * float((s[rank:] ** 2).sum())) == better


@pytest.mark.parametrize(("atoms", "bits"), [(1, 1), (5, 3), (256, 8), (257, 9), (1000, 10)])
def test_places_take_the_bits_that_atoms_ask_for(atoms: int, bits: int) -> None:
    k = min(atoms, 8)
    places = torch.rand(16, atoms, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :k]
    term = DenseSparse.of(torch.randn(atoms, 4), torch.randn(16, k), places)
    assert torch.equal(term.places(), places)
    assert term.bits.nbytes == 16 * k * bits // 8


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(WeftError, match="share is 0"):
        sizes(Shape(8, 8), {"share": 0})
