"""AdaDim: per input is per row of the transpose, and the structure that is planted decides which is chosen."""

from __future__ import annotations

import pytest
import torch

from weft.methods import METHODS, Site
from weft.seeds import generator
from weft.terms import Dense, IntegerCode, TransposedCode


def made(W, H=None, **options):
    moments = {"input_moment": torch.eye(W.shape[1], dtype=torch.float64) if H is None else H}
    site = Site("layer", {"base": Dense.from_matrix(W)}, 3, 3, moments, generator(0, "layer"))
    return METHODS["adadim"].split(site, **METHODS["adadim"].options(options)).terms["base"]


def normal(out=128, inn=256):
    return torch.randn(out, inn, generator=torch.Generator().manual_seed(0))


def error(T, W, H):
    return float(((T.dense() - W) @ H.float() * (T.dense() - W)).sum())


@pytest.mark.parametrize(("where", "chosen"), [("column", TransposedCode), ("row", IntegerCode)])
def test_what_stands_out_decides(where, chosen):
    W = normal()
    W[:, 5] *= 10 if where == "column" else 1
    W[5] *= 10 if where == "row" else 1
    assert type(made(W, group=64)) is chosen


def test_a_small_column_with_a_large_input_keeps_to_itself():
    W, H = normal(), torch.eye(256, dtype=torch.float64)
    W[:, 5] *= 0.1
    H[5, 5] = 100.0**2
    term = made(W, H, group=64)
    per_row = IntegerCode.from_matrix(W, 3, 64)
    assert type(term) is TransposedCode and error(term, W, H) < 0.5 * error(per_row, W, H)
    assert torch.equal(term.dense(), IntegerCode.from_matrix(W.mT.contiguous(), 3, 64).dense().mT)
    assert term.nbytes == per_row.nbytes


def test_where_groups_do_not_divide_they_run_along_the_inputs():
    W = normal(100, 256)
    W[:, 5] *= 10
    assert type(made(W, group=64)) is type(made(W, group=None)) is IntegerCode
