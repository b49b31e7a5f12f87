"""Pre-training in structure against plain line-by-line references in fp64, and the numbers that papers say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.methods.one_layer import One, close
from weft.errors import WeftError
from weft.methods.low_rank import METHOD as LOW_RANK
from weft.methods.sltrain import METHOD as SLTRAIN
from weft.rules import Rules
from weft.terms import LowRank, Sparse
from weft.train.sizes import SIZES
from weft.verbs.fresh import Structure, restructure

OUT, IN, RANK, STEPS, RATE = 48, 64, 6, 20, 1e-2


def start(method, rank=RANK, **options) -> One:
    """One layer of a fresh model in the method's structure, in fp64."""
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / IN**0.5
    model = One(W).double()
    restructure(model, Structure.of(method, rank, options))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    target = torch.randn(IN, OUT, generator=draw, dtype=torch.float64) / IN**0.5
    rows = [torch.randn(40, IN, generator=draw, dtype=torch.float64) for _ in range(STEPS)]
    return [(x, x @ target) for x in rows]


def run(model: One, structure: Structure | None = None, rate: float = RATE) -> list[float]:
    """The steps with AdamW and the method's rules; their losses."""
    rules = Rules([] if structure is None else structure.rules(model, 0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    rules.bind(optimizer)
    rules.start(model, steps=STEPS)
    losses = []
    for step, (x, y) in enumerate(batches(), 1):
        loss = (model(x) - y).square().mean()
        penalty = rules.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        rules.before_step(model, step)
        optimizer.step()
        rules.after_step(model, step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


class PlainAdam:
    """Adam of one tensor, line by line."""

    def __init__(self, rate: float = RATE) -> None:
        self.rate, self.t, self.m, self.v = rate, 0, 0.0, 0.0

    def step(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g * g
        return self.rate * (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)


def llama(size: str) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# --- sltrain ----------------------------------------------------------------------------------------------------------


def test_sltrain_has_the_numbers_of_the_paper():
    """LLaMA 60M at rank 128 and density 0.03: 43.53 million, 42.77 of them without the sparse part."""
    with torch.device("meta"):
        model = restructure(llama("60m"), "sltrain", 128, density=0.03)
    sparse = sum(m.values.numel() for m in model.modules() if isinstance(m, Sparse))
    assert sum(p.numel() for p in model.parameters()) == 43_529_832 and sparse == 758_888
    scales = {m.scale for m in model.modules() if isinstance(m, LowRank)}
    assert scales == {0.25}


def test_sltrain_starts_as_its_sparse_part_of_full_rank():
    model = start(SLTRAIN, density=0.1)
    low, sparse = model.layer.terms["low_rank"], model.layer.terms["sparse"]
    positions = sparse.positions
    assert len(positions) == int(0.1 * OUT * IN) and bool((positions[1:] > positions[:-1]).all())
    assert not low.B.any() and torch.equal(model.layer.dense(torch.float64), sparse.dense())
    for values, bound in ((low.A, IN**-0.5), (sparse.values, IN**-0.5)):
        assert 0.9 * bound < float(values.detach().abs().max()) <= bound
    assert int(torch.linalg.matrix_rank(model.layer.dense(torch.float64))) > 5 * RANK
    other = start(SLTRAIN, density=0.1)
    assert torch.equal(other.layer.terms["sparse"].positions, positions)


def test_sltrain_follows_its_lines():
    model = start(SLTRAIN, density=0.1, alpha=12.0)
    low, sparse = model.layer.terms["low_rank"], model.layer.terms["sparse"]
    B, A, s = (t.detach().clone() for t in (low.B, low.A, sparse.values))
    rows, columns, scale = sparse.positions.long() // IN, sparse.positions.long() % IN, 12.0 / RANK
    adams, losses = [PlainAdam() for _ in range(3)], []
    for x, y in batches():
        W = scale * (B @ A)
        W[rows, columns] += s
        residual = x @ W.T - y
        losses.append(float(residual.square().mean()))
        G = 2.0 / residual.numel() * residual.T @ x
        grads = (scale * G @ A.T, scale * B.T @ G, G[rows, columns])
        B, A, s = (t - adam.step(g) for t, adam, g in zip((B, A, s), adams, grads, strict=True))
    positions = sparse.positions.clone()
    assert run(model) == pytest.approx(losses, rel=1e-9)
    for mine, plain in ((low.B, B), (low.A, A), (sparse.values, s)):
        close(mine, plain, 1e-8)
    assert torch.equal(sparse.positions, positions)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"density": 0.01},
            r"density of 0.01 gives layer \(48 x 64\) 30 entries, fewer than it has rows, .*give 0.0156",
        ),
        ({"density": 0.0}, "density is 0.0: give a share"),
        ({"density": 1.5}, "density is 1.5: give a share"),
    ],
)
def test_sltrain_refuses_a_density_that_leaves_rows_empty(options, sentence):
    with pytest.raises(WeftError, match=sentence):
        start(SLTRAIN, **options)


# --- low rank ---------------------------------------------------------------------------------------------------------


def test_low_rank_follows_its_lines():
    model = start(LOW_RANK, std=0.05)
    term = model.layer.terms["low_rank"]
    B, A = term.B.detach().clone(), term.A.detach().clone()
    adams, losses = [PlainAdam() for _ in range(2)], []
    for x, y in batches():
        residual = x @ A.T @ B.T - y
        losses.append(float(residual.square().mean()))
        G = 2.0 / residual.numel() * residual.T @ x
        B, A = (t - adam.step(g) for t, adam, g in zip((B, A), adams, (G @ A.T, B.T @ G), strict=True))
    assert run(model) == pytest.approx(losses, rel=1e-9)
    close(term.B, B, 1e-8)
    close(term.A, A, 1e-8)
