"""lord: principal components of the outputs, by a plain loop in fp64; ranks in multiples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.allocate import Shape
from weft.errors import WeftError
from weft.methods import METHODS, Site
from weft.methods.lord import factorise, sizes
from weft.seeds import generator
from weft.terms import Dense

OUT, IN, TOKENS = 10, 14, 120


def data(rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """W, b, and inputs with a mean that matters; of `rank`, inputs whose outputs vary in so many directions."""
    draw = torch.Generator().manual_seed(0)
    W, b = torch.randn(OUT, IN, generator=draw, dtype=torch.float64), torch.randn(OUT, generator=draw).double()
    basis = torch.randn(rank or IN, IN, generator=draw, dtype=torch.float64)
    x = torch.randn(TOKENS, rank or IN, generator=draw, dtype=torch.float64) @ basis
    return W, b, x + 3 * torch.randn(IN, generator=draw, dtype=torch.float64)


def compressed(W: Tensor, b: Tensor, x: Tensor, rank: int, **options: object) -> tuple[Tensor, Tensor]:
    method = METHODS["lord"]
    moments = {"input_moment": x.mT @ x / len(x), "input_mean": x.mean(0)}
    site = Site("layer", {"base": Dense.from_matrix(W)}, rank, rank, moments, generator(0, "l"), torch.float64, bias=b)
    assert method.split is not None
    made = method.split(replace(site), **(dict(method.defaults) | options))
    assert made.bias is not None
    return made.terms["low_rank"].dense(), made.bias


def by_hand(W: Tensor, b: Tensor, x: Tensor, rank: int) -> np.ndarray:
    """What the layer gives, one token and one component at a time."""
    outputs = np.array([[sum(w * v for w, v in zip(row, t, strict=True)) for row in W.tolist()] for t in x.tolist()])
    outputs += b.numpy()
    mean = outputs.mean(0)
    covariance = sum(np.outer(y - mean, y - mean) for y in outputs) / len(outputs)
    values, vectors = np.linalg.eigh(covariance)
    best = [vectors[:, i] for i in np.argsort(-values)[:rank]]
    return np.array([mean + sum((u @ (y - mean)) * u for u in best) for y in outputs])


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_outputs_are_their_own_principal_components(rank: int) -> None:
    W, b, x = data()
    W_, b_ = compressed(W, b, x, rank, ridge=0.0)
    np.testing.assert_allclose((x @ W_.mT + b_).detach().numpy(), by_hand(W, b, x, rank), atol=1e-8)


def test_outputs_of_few_directions_are_kept_and_a_second_time_changes_nothing() -> None:
    W, b, x = data(rank=3)
    W_, b_ = compressed(W, b, x, 3, ridge=0.0)
    assert torch.allclose(x @ W_.mT + b_, x @ W.mT + b, atol=1e-6)
    W, b, x = data()
    once = compressed(W, b, x, 4, ridge=0.0)
    again = compressed(*once, x, 4, ridge=0.0)
    assert torch.allclose(again[0], once[0], atol=1e-8) and torch.allclose(again[1], once[1], atol=1e-8)


def test_without_a_mean_it_is_the_truncation_of_svd_llm() -> None:
    W, _, x = data()
    moments = {"input_moment": x.mT @ x / len(x), "input_mean": x.mean(0)}
    mine, theirs = factorise(W, moments, bias=False), METHODS["svd-llm"].split.factorise(W, moments, ridge=1e-4)  # type: ignore[union-attr]
    assert torch.allclose(mine.B[:, :5] @ mine.A[:5], theirs.B[:, :5] @ theirs.A[:5], atol=1e-8)


def test_ranks_are_multiples_that_save() -> None:
    shape = Shape(576, 1536, 2)
    found = sizes(shape, {"multiple": 16})
    assert [rank for rank, _ in found] == list(range(16, 419, 16)) and 576 * 1536 / (576 + 1536) < 432
    assert all(nbytes == 2 * rank * (576 + 1536) < shape.nbytes for rank, nbytes in found)
    assert [rank for rank, _ in sizes(Shape(16, 16), {"multiple": 8})] == list(range(1, 8)), "a small layer"
    with pytest.raises(WeftError, match="multiple is 0"):
        factorise(torch.eye(2), {}, multiple=0)
