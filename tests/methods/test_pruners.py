"""Wanda and SparseGPT against plain loops, their patterns, and what the masked term stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weft.errors import WeftError
from weft.linalg.column_errors import columns
from weft.methods import METHODS, Site
from weft.methods.sparsegpt import prune
from weft.methods.wanda import largest, parsed_pattern
from weft.seeds import generator
from weft.terms import Dense, Masked
from weft.testing_adapters import task, tiny_llama
from weft.verbs.compress import compress


def layer(out=8, inn=24, tokens=200):
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, inn, generator=draw, dtype=torch.float64)
    X = X @ torch.randn(inn, inn, generator=draw, dtype=torch.float64)
    return torch.randn(out, inn, generator=draw, dtype=torch.float64), X.mT @ X / tokens


def site(W, H, size):
    return Site("layer", {"base": Dense.from_matrix(W.float())}, size, size, {"input_moment": H}, generator(0, "layer"))


def eliminated(W, H, keep, damping=0.01):
    """SparseGPT on one block without Cholesky factors: each column is taken out of the inverse of H in turn."""
    W, H, (out, inn) = W.numpy().copy(), H.numpy().copy(), W.shape
    H += damping * np.mean([H[j, j] for j in range(inn)]) * np.eye(inn)
    inverses, inverse = [], np.linalg.inv(H)
    for j in range(inn):
        inverses.append(inverse.copy())
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    scores = {(i, j): W[i, j] ** 2 / inverses[j][j, j] for i in range(out) for j in range(inn)}
    stay = set(sorted(scores, key=scores.__getitem__)[out * inn - keep :])
    for j in range(inn):
        for i in range(out):
            if (i, j) not in stay:
                error = W[i, j] / inverses[j][j, j]
                for k in range(j + 1, inn):
                    W[i, k] -= error * inverses[j][j, k]
                W[i, j] = 0
    return torch.from_numpy(W)


def test_sparsegpt_equals_a_reference_that_shares_no_code():
    W, H = layer()
    made, mask = prune(W, columns(H), 0.5)
    torch.testing.assert_close(made, eliminated(W, H, W.numel() // 2), atol=1e-8, rtol=1e-8)
    assert mask.sum() == W.numel() // 2 and (made[~mask] == 0).all()


def test_wanda_keeps_the_largest_products_of_each_row_as_they_are():
    W, H = layer()
    term = METHODS["wanda"].split(site(W, H, 0.25), pattern="unstructured").terms["base"]
    for i in range(len(W)):
        scores = {j: float(abs(W[i, j]) * H[j, j] ** 0.5) for j in range(24)}
        stay = sorted(scores, key=scores.__getitem__)[-6:]
        expected = torch.zeros(24)
        expected[stay] = W[i, stay].float()
        assert torch.equal(term.dense()[i].detach(), expected)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_patterns_keep_n_of_every_m(name, pattern):
    W, H = layer()
    method, (n, m) = METHODS[name], parsed_pattern(pattern)
    options = method.options({"pattern": pattern})
    ((size, nbytes),) = method.sizes(type("S", (tuple,), {"itemsize": 4, "numel": 192})((8, 24)), options)
    term = method.split(site(W, H, size), **options).terms["base"]
    assert (term.mask().unflatten(1, (-1, m)).sum(-1) == n).all()
    assert term.nbytes == nbytes == 8 * 24 * 4 * n // m + 8 * 24 // 8


def test_sparsegpt_loses_less_than_wanda():
    W, H = layer()

    def lost(term):
        D = term.dense(torch.float64).detach() - W
        return float(((D @ H) * D).sum())

    terms = [METHODS[n].split(site(W, H, 0.5), **METHODS[n].options({})).terms["base"] for n in ("wanda", "sparsegpt")]
    assert lost(terms[1]) < 0.95 * lost(terms[0])


def test_gradients_reach_the_kept_numbers_alone():
    W, _ = layer()
    mask = largest(W.abs(), 10)
    term = Masked.from_mask(W, mask)
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    term(x).square().sum().backward()
    leaf = (W * mask).requires_grad_()
    (x @ leaf.mT).square().sum().backward()
    torch.testing.assert_close(term.values.grad, leaf.grad[mask])


def test_bad_patterns_are_refused():
    for pattern in ("4:2", "2", "a:b", "0:4"):
        with pytest.raises(WeftError, match="is none: give N:M"):
            parsed_pattern(pattern)
    with pytest.raises(WeftError, match="5 does not divide"):
        compress(tiny_llama(), "wanda", batches=task(), pattern="2:5")
