"""codebook and jlcm: tables that k-means finds, walks and steps line by line in fp64, and what is stored of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.methods.one_layer import close
from tests.methods.test_structures import PlainAdam
from weft.errors import WeftError
from weft.kernels.codebooks import kmeans, nearest
from weft.linalg.column_errors import columns
from weft.methods import METHODS, Site
from weft.methods.codebook import refitted, walked
from weft.methods.jlcm import groups_of, learn
from weft.seeds import generator
from weft.terms import Codebook, Dense

OUT, IN, K, TOKENS = 12, 20, 4, 60


def drawn() -> tuple[Tensor, Tensor]:
    """W, whose rows are of three sizes, and H."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(OUT, IN, generator=draw).double() * torch.tensor([1.0, 3.0, 0.2]).repeat(OUT // 3)[:, None]
    x = torch.randn(TOKENS, IN, generator=draw).double() @ torch.randn(IN, IN, generator=draw).double()
    return W, x.T @ x / TOKENS


def lost(D: Tensor, H: Tensor) -> float:
    return float(((D @ H) * D).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_k_means_ends_where_each_number_is_nearest_and_each_codeword_the_mean_of_its_own(weighted):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 200, generator=draw).double()
    w = torch.rand(3, 200, generator=draw).double() if weighted else torch.ones(1, 1).double()
    books = kmeans(x, w, 4)
    assert bool((books[:, 1:] > books[:, :-1]).all())
    for numbers, weights, book in zip(x, w.expand_as(x), books, strict=True):
        owner = (numbers[:, None] - book).abs().argmin(1)
        assert torch.equal(owner, nearest(numbers[None], book[None])[0])
        means = [float((numbers * weights)[owner == k].sum() / weights[owner == k].sum()) for k in range(4)]
        close(book, torch.tensor(means), 5e-2)  # so many steps are nearly at rest
        even = torch.linspace(float(numbers.min()), float(numbers.max()), 4).double()
        error = [float((weights * (numbers[:, None] - b).abs().amin(1).square()).sum()) for b in (book, even)]
        assert error[0] < 0.9 * error[1]


def test_numbers_that_a_table_can_hold_lose_nothing():
    x = torch.tensor([[3.0, -1.0, 0.5, 0.5, 3.0, -1.0, 3.0, 7.0]])
    books = kmeans(x, torch.ones(1, 1), 4)
    assert torch.equal(books.gather(1, nearest(x, books)), x)


def test_the_walk_is_that_of_the_inverse_shrunk_column_by_column():
    """Optimal brain quantisation: after each column the inverse loses it by one step of Gauss."""
    W, H = drawn()
    books = kmeans(W, H.diagonal(), K)
    codes = walked(W, columns(H, damping=0.01), books)
    rest = W.clone()
    inverse = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(IN, dtype=torch.float64))
    for j in range(IN):
        for i in range(OUT):
            k = min(range(K), key=lambda k: abs(float(rest[i, j] - books[i, k])))
            assert int(codes[i, j]) == k
            error = (rest[i, j] - books[i, k]) / inverse[j, j]
            rest[i, j + 1 :] -= error * inverse[j, j + 1 :]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    plain = nearest(W, books)
    assert lost(books.gather(1, codes) - W, H) < 0.9 * lost(books.gather(1, plain) - W, H)


def test_the_last_tables_lose_least_for_their_codes():
    W, H = drawn()
    books = kmeans(W, H.diagonal(), K)
    codes = walked(W, columns(H), books)
    better = refitted(W, H, codes, books)
    least = lost(better.gather(1, codes) - W, H)
    assert least < lost(books.gather(1, codes) - W, H)
    for i, k in ((0, 0), (5, 2), (11, 3)):
        for step in (-1e-2, 1e-2):
            moved = better.clone()
            moved[i, k] += step
            assert lost(moved.gather(1, codes) - W, H) > least


def test_a_codeword_that_nobody_has_stays_where_it_was():
    W, H = drawn()
    books = kmeans(W, H.diagonal(), K)
    found = refitted(W, H, torch.ones(OUT, IN, dtype=torch.long), books)
    assert torch.equal(found[:, [0, 2, 3]], books[:, [0, 2, 3]]) and not torch.equal(found[:, 1], books[:, 1])


def tables_of(W: Tensor, owners: Tensor, count: int) -> Tensor:
    return torch.cat([kmeans(W[owners == g].reshape(1, -1), torch.ones(1, 1).double(), K) for g in range(count)])


def test_rows_of_one_size_come_together_and_lose_less_by_themselves():
    W, H = drawn()
    owners = groups_of(W, 3)
    assert owners.bincount().tolist() == [4, 4, 4]
    sizes = torch.tensor([0, 1, 2]).repeat(OUT // 3)
    assert all(len(set(owners[sizes == size].tolist())) == 1 for size in range(3))
    one = torch.zeros_like(owners)
    errors = [learn(W, H, of, tables_of(W, of, n), 0).losses[0] for of, n in ((owners, 3), (one, 1))]
    assert errors[0] < 0.7 * errors[1]
    books = tables_of(W, one, 1)
    assert errors[1] == pytest.approx(lost(books[one].gather(1, nearest(W, books[one])) - W, H), rel=1e-9)


@pytest.mark.parametrize("near", [True, False])
def test_learning_follows_its_lines(near):
    W, H = drawn()
    owners, steps = groups_of(W, 3), 12
    start = tables_of(W, owners, 3)
    s = [float(start[g, -1] - start[g, 0]) / (K - 1) for g in range(3)]
    gap = torch.tensor([s[int(g)] for g in owners])
    M = torch.stack([torch.stack([-(((w - start[owners[i]]) / gap[i]) ** 2) for w in W[i]]) for i in range(OUT)])
    books, adams, losses = start.clone(), [PlainAdam(), PlainAdam()], []
    for step in range(steps + 1):
        codes = [[max(range(K), key=lambda k: float(M[i, j, k])) for j in range(IN)] for i in range(OUT)]
        W_ = torch.stack([torch.stack([books[owners[i], codes[i][j]] for j in range(IN)]) for i in range(OUT)])
        losses.append(lost(W_ - W, H))
        P, gM, gB, factor = 2 * (W_ - W) @ H, torch.zeros_like(M), torch.zeros_like(books), torch.ones_like(M)
        for i in range(OUT):
            c = books[owners[i]]
            for j in range(IN):
                p = M[i, j].softmax(0)
                pull = float(P[i, j]) * c
                gM[i, j] = p * (pull - (p * pull).sum())
                if near:
                    factor[i, j] = torch.tensor(
                        [math.exp(-abs(float(c[k] - c[codes[i][j]])) / gap[i]) for k in range(K)]
                    )
                gB[owners[i], codes[i][j]] += P[i, j]
        share = 1 - step / steps
        sizes = torch.tensor(s, dtype=torch.float64)[:, None]
        M = M - adams[0].step(gM) * share * factor
        books = books - adams[1].step(gB * sizes) * sizes * share
    found = learn(W, H, owners, start, steps, near=near)
    assert found.losses == pytest.approx(losses, rel=1e-6)
    assert lost(found.books[owners].gather(1, found.codes) - W, H) == pytest.approx(min(losses), rel=1e-6)


def test_learning_loses_less_and_codes_move_to_neighbours_first():
    W, H = drawn()
    owners = groups_of(W, 3)
    start = tables_of(W, owners, 3)
    first, few, many = (learn(W, H, owners, start, steps) for steps in (0, 30, 100))
    assert lost(many.books[owners].gather(1, many.codes) - W, H) < 0.85 * first.losses[0]
    moved = (few.codes - first.codes).abs()
    assert int(moved.max()) == 1 and int(moved.sum()) > 5


def site(W: Tensor, H: Tensor, dtype: torch.dtype = torch.float32) -> Site:
    terms = {"base": Dense.from_matrix(W.to(dtype))}
    return Site("layer", terms, 2, 2, {"input_moment": H}, generator(0, "layer"), dtype)


@pytest.mark.parametrize(("name", "tables", "owners"), [("codebook", OUT, 0), ("jlcm", 3, 3)])
def test_bytes_are_codes_and_tables_and_what_tells_them_apart(name, tables, owners):
    method, more = METHODS[name], {} if name == "codebook" else {"groups": 3}
    term = method.split(site(*drawn()), **method.options(more)).terms["base"]
    assert isinstance(term, Codebook) and term.nbytes == OUT * IN // 4 + tables * 4 * 2 + owners
    assert all(len(row.unique()) <= 4 for row in term.dense())


@pytest.mark.parametrize("groups", [1, OUT, 500])
def test_any_number_of_groups_is_stored_as_it_is_learned(groups):
    W, H = drawn()
    method = METHODS["jlcm"]
    term = method.split(site(W, H), **method.options({"groups": groups, "steps": 3})).terms["base"]
    count = min(groups, OUT)
    found = learn(
        W.float(), H.float(), groups_of(W.float(), count), tables_of(W, groups_of(W.float(), count), count).float(), 3
    )
    close(term.dense(), found.books[groups_of(W.float(), count)].gather(1, found.codes), 2e-3)


def test_what_cannot_be_is_said():
    with pytest.raises(WeftError, match="Codebooks have 1 to 4 bits here, not 5"):
        METHODS["codebook"].sizes((8, 8), {"bits": 5})
    with pytest.raises(WeftError, match="no codebooks of 9 bits"):
        Codebook(8, 8, bits=9)
    with pytest.raises(WeftError, match="5 tables are none for 4 rows"):
        Codebook(8, 4, tables=5)
    W, H = drawn()
    with pytest.raises(WeftError, match="Layer layer cannot be coded: a number is beyond 16 bits"):
        METHODS["codebook"].split(replace(site(1e6 * W, H), size=2), **METHODS["codebook"].options({}))
