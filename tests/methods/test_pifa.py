"""pifa: kfac-svd's matrix at every rank, in the bytes that it says, through saving and loading."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.stats.models import batches, build
from weft.methods import METHODS, kfac_svd, pifa
from weft.methods.base import Shape
from weft.terms import SumLinear
from weft.terms.layers import linear_layers
from weft.verbs.compress import compress


def test_at_equal_ranks_it_is_kfac_svd_in_fewer_bytes() -> None:
    data, models = batches("llama"), {name: build("llama") for name in ("kfac-svd", "pifa")}
    ranks = compress(models["kfac-svd"], "kfac-svd", budget=0.5, batches=data).allocation
    done = compress(models["pifa"], "pifa", allocate=dict(ranks), batches=data).allocation
    assert done.spent < ranks.spent
    for name, rank in ranks.items():
        if rank is not None:
            one, other = (model.get_submodule(name) for model in models.values())
            assert isinstance(one, SumLinear) and isinstance(other, SumLinear)
            torch.testing.assert_close(other.dense(), one.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9), (1, 5), (64, 16), (400, 40)])
def test_sizes_are_the_bytes_of_the_terms_and_grow(shape: tuple[int, int], itemsize: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    sizes = pifa.sizes(Shape(*shape, itemsize), {})
    assert {rank for rank, _ in sizes} <= set(range(1, min(shape))) and len(sizes) >= min(shape) - 3
    assert all(a < b and m < n for (a, m), (b, n) in pairwise(sizes))
    for rank, nbytes in sizes:
        term = pifa.pivoted(torch.randn(shape[0], rank).to(dtype), torch.randn(rank, shape[1]).to(dtype))
        assert term.nbytes == nbytes
    theirs = dict(METHODS["kfac-svd"].sizes(Shape(100, 80), {}))
    ours = dict(pifa.sizes(Shape(100, 80), {}))
    assert all(theirs[r] - ours[r] == 4 * (r * r - 100 if r * r > 200 else 0) for r in theirs)


def test_a_budget_buys_less_predicted_loss_than_two_factors() -> None:
    data = batches("llama")
    found = {name: compress(build("llama"), name, budget=0.5, batches=data).allocation for name in ("kfac-svd", "pifa")}
    losses = {name: sum(choice.loss for choice in done.choices.values()) for name, done in found.items()}
    assert losses["pifa"] < losses["kfac-svd"]
    assert found["pifa"].spent <= found["pifa"].allowed == found["kfac-svd"].allowed
    assert pifa.METHOD.needs == kfac_svd.METHOD.needs


def test_it_is_saved_and_opened_with_the_bytes_that_it_says(tmp_path: Path) -> None:
    model, data = build("llama"), batches("llama")
    done = compress(model, "pifa", budget=0.6, batches=data)
    stored = sum(term.nbytes for m in model.modules() if isinstance(m, SumLinear) for term in m.terms.values())
    dense = sum(done.allocation.shapes[name].nbytes for name, rank in done.allocation.items() if rank is None)
    assert stored + dense == done.allocation.spent
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, model(**data[0]).logits)
    assert linear_layers(again).keys() == linear_layers(model).keys()
