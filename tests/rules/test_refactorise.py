"""Refactorisation keeps the product, balances the factors, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from weft.linalg.svd import product_factors
from weft.rules.refactorise import Refactorise
from weft.terms import LowRank, Sparse, SumLinear
from weft.train.sizes import fresh_model
from weft.verbs.fresh import restructure


def model_of(dtype=torch.float32, skew=10.0):
    """One layer of badly scaled factors, rank 4 of 12 x 10, and a sparse term."""
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((12, 4), (4, 10)))
    sparse = torch.zeros(12, 10, dtype=dtype)
    sparse[2, 3] = sparse[7, 1] = 1.5
    terms = {
        "low_rank": LowRank.from_factors(B * skew, A / skew, scale=0.5),
        "sparse": Sparse.from_mask(sparse, sparse != 0),
    }
    return nn.Sequential(SumLinear(terms))


def low_rank(model):
    (term,) = (m for m in model.modules() if isinstance(m, LowRank))
    return term


def refactorised(model):
    started(Refactorise(1), model).after_step(model, 1)
    return low_rank(model)


def started(rule, model):
    rule.start(model)
    return rule


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_product_stays(dtype, tolerance):
    model = model_of(dtype)
    product, whole = low_rank(model).dense(), model[0].dense()
    term = refactorised(model)
    assert (term.dense() - product).norm() / product.norm() < tolerance
    assert (model[0].dense() - whole).norm() / whole.norm() < tolerance
    assert term.scale == 0.5 and term.A.dtype == term.B.dtype == dtype


def test_the_factors_share_the_singular_values():
    model = model_of(torch.float64)
    values = torch.linalg.svdvals(low_rank(model).B @ low_rank(model).A)[:4]
    term = refactorised(model)
    torch.testing.assert_close(term.B.mT @ term.B, values.diag(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(term.A @ term.A.mT, values.diag(), atol=1e-10, rtol=1e-10)


def test_a_second_time_changes_signs_at_most():
    model = model_of(torch.float64)
    first = refactorised(model).B.detach().clone()
    second = refactorised(model).B
    torch.testing.assert_close(second.abs(), first.abs(), atol=1e-10, rtol=1e-10)


def test_the_condition_number_does_not_grow():
    def condition(term):
        values = torch.cat([torch.linalg.svdvals(term.B), torch.linalg.svdvals(term.A)]).square()
        return float((values.max() / values.min()).detach())

    model = model_of(torch.float64)
    before = condition(low_rank(model))
    after = condition(refactorised(model))
    values = torch.linalg.svdvals(low_rank(model).B @ low_rank(model).A)[:4]
    assert after < before / 100 and after == pytest.approx(float(values[0] / values[3]))


def test_a_product_of_zero_stays_zero():
    model = model_of()
    with torch.no_grad():
        low_rank(model).B.zero_()
    term = refactorised(model)
    assert all(p.isfinite().all() for p in term.parameters()) and not term.dense().any()


def test_only_trained_factors_and_only_at_multiples():
    model = model_of()
    before = low_rank(model).B.detach().clone()
    rule = started(Refactorise(3), model)
    for step in (1, 2, 4):
        rule.after_step(model, step)
    assert torch.equal(low_rank(model).B, before)
    low_rank(model).A.requires_grad_(False)
    started(rule, model).after_step(model, 3)
    assert torch.equal(low_rank(model).B, before)
    low_rank(model).A.requires_grad_(True)
    started(rule, model).after_step(model, 3)
    assert not torch.equal(low_rank(model).B, before)


def test_the_model_computes_what_it_did():
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = restructure(fresh_model(LlamaConfig(**sizes, num_attention_heads=2), 0), "low-rank", 8, 0).eval()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        before = model(ids).logits
        started(Refactorise(5), model).after_step(model, 10)
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


def test_a_zero_product_keeps_its_factors() -> None:
    term = LowRank.from_factors(torch.zeros(6, 2), torch.ones(2, 4))
    rule = Refactorise(every=1)
    rule.start(term, {"layer": {"low_rank": term}})
    rule.after_step(term, 1)
    assert not term.B.any() and term.A.any()


def test_a_rank_above_the_size_keeps_its_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(3, 7, generator=generator), torch.randn(7, 4, generator=generator)
    again = product_factors(B, A)
    assert again[0].shape == B.shape and again[1].shape == A.shape
    assert torch.allclose(again[0] @ again[1], B @ A, atol=1e-4)
