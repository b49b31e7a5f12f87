"""Pre-training in structure against plain line-by-line references in fp64, and the numbers that papers say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.methods.one_layer import One, close
from weft.errors import WeftError
from weft.methods import METHODS
from weft.methods.low_rank import METHOD as LOW_RANK
from weft.methods.sltrain import METHOD as SLTRAIN
from weft.rules import Rules
from weft.terms import LowRank, Monarch, Sparse
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


def by_autograd(function, tensors: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """The steps of plain Adam on the gradients of a function (x, *tensors) -> y written out line by line."""
    tensors = [t.detach().clone() for t in tensors]
    adams, losses = [PlainAdam() for _ in tensors], []
    for x, y in batches():
        leaves = [t.requires_grad_(True) for t in tensors]
        loss = (function(x, *leaves) - y).square().mean()
        grads = torch.autograd.grad(loss, leaves)
        tensors = [(t - adam.step(g)).detach() for t, adam, g in zip(leaves, adams, grads, strict=True)]
        losses.append(float(loss.detach()))
    return losses, tensors


def follows(model: One, function, named: dict[str, Tensor]) -> None:
    """Training the model is training these of its tensors by the function."""
    losses, ends = by_autograd(function, list(named.values()))
    assert run(model) == pytest.approx(losses, rel=1e-8)
    for mine, plain in zip(named.values(), ends, strict=True):
        close(mine, plain, 1e-7)


# --- cola and lost ----------------------------------------------------------------------------------------------------


def test_cola_follows_its_lines():
    model = start("cola")
    term = model.layer.terms["low_rank"]

    def lines(x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        h = x @ A.T
        return (h / (1 + torch.exp(-h))) @ B.T

    follows(model, lines, {"B": term.B, "A": term.A})


def test_cola_starts_with_entries_of_variance_one_over_both_sides():
    W = torch.randn(400, 600, generator=torch.Generator().manual_seed(0))
    model = restructure(One(W), "cola", 64)
    term = model.layer.terms["low_rank"]
    assert float((term.B @ term.A).var().detach()) == pytest.approx(1 / 1000, rel=0.05)
    with pytest.raises(WeftError, match="is no matrix: it cannot be merged"):
        model.layer.dense()


def drawn() -> Tensor:
    return (torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / IN**0.5).double()


def test_lost_follows_its_lines():
    model = start("lost", density=0.1, gamma=0.8)
    low, columns = model.layer.terms["low_rank"], model.layer.terms["columns"]
    U, s, V = torch.linalg.svd(drawn(), full_matrices=False)
    rest = drawn() - (U[:, :RANK] * s[:RANK]) @ V[:RANK]
    kept = rest.norm(dim=0).argsort(descending=True)[: int(0.1 * IN)].sort().values
    assert torch.equal(columns.columns.long(), kept)
    close(columns.B, drawn()[:, kept], 1e-6)
    close(low.B.T @ low.B, s[:RANK].diag(), 1e-5)
    close(low.A @ low.A.T, s[:RANK].diag(), 1e-5)

    def lines(x: Tensor, B: Tensor, A: Tensor, C: Tensor) -> Tensor:
        h = x @ A.T
        return 0.8 * (h * torch.sigmoid(h)) @ B.T + 0.2 * x[:, kept] @ C.T

    follows(model, lines, {"B": low.B, "A": low.A, "C": columns.B})
    assert torch.equal(columns.columns.long(), kept)


def test_lost_in_its_linear_form_with_all_columns_of_the_remainder_is_the_start():
    model = start("lost", density=1.0, gamma=0.5, activation=None, start="remainder")
    close(2 * model.layer.dense(torch.float64), drawn(), 1e-6)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("lost", {"density": 0.01}, r"density of 0.01 keeps 0 of the 64 columns of layer; give 0.0156"),
        ("lost", {"gamma": 1.0}, "gamma is 1.0"),
        ("lost", {"start": "zero"}, "no start of the columns called 'zero'"),
        ("lost", {"activation": "sillu"}, "no activation between two factors called 'sillu'; the nearest are: silu"),
        ("cola", {"activation": "sillu"}, "no activation between two factors called 'sillu'"),
        ("monarch", {"blocks": 5}, r"blocks is 5, which does not fit layer \(48 x 64\)"),
        ("monarch", {"blocks": 8}, "its square the smaller one"),
        ("monarch", {"start": "svd"}, "no start of a Monarch matrix called 'svd'"),
        ("weight-compander", {"kappa": 0.0}, "kappa is 0.0 and rho 1.0: give two numbers above 0"),
    ],
)
def test_wrong_options_are_sentences(method, options, sentence):
    with pytest.raises(WeftError, match=sentence):
        start(method, None if method in ("monarch", "weight-compander") else RANK, **options)


# --- monarch ----------------------------------------------------------------------------------------------------------


def test_monarch_is_two_block_diagonal_matrices_and_shuffles():
    """P L P^T R with the shuffle written out, and its own matrix."""
    model = start("monarch", None, blocks=4, start="kaiming")
    term = model.layer.terms["monarch"]
    k, j, b = 4, 4, OUT // 16
    x = torch.randn(7, IN, dtype=torch.float64)
    y = torch.zeros(7, OUT, dtype=torch.float64)
    for block in range(j):
        for piece in range(k):
            xs = x[:, piece * IN // k : (piece + 1) * IN // k]
            for c in range(b):
                h = xs @ term.w1[piece, c * j + block]
                y[:, block::j] += h[:, None] * term.w2[block, :, piece * b + c]
    close(model(x), y, 1e-12)
    close(x @ term.dense().T, y, 1e-12)


def test_monarch_follows_its_lines():
    model = start("monarch", None, blocks=4)
    term = model.layer.terms["monarch"]

    def lines(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        h = torch.einsum("nki,kci->nkc", x.view(len(x), 4, -1), w1)
        h = h.view(len(x), 4, -1, 4)  # piece, component, block
        return torch.einsum("nkbj,jtkb->ntj", h, w2.view(4, OUT // 4, 4, -1)).reshape(len(x), OUT)

    follows(model, lines, {"w1": term.w1, "w2": term.w2})


@pytest.mark.parametrize(("k", "j", "b"), [(4, 4, 3), (2, 3, 5), (8, 6, 1), (1, 1, 7)])
def test_the_projection_on_monarch_loses_the_cut_singular_values_of_each_block(k, j, b):
    W = drawn()
    term = Monarch.from_matrix(W, k, j, b)
    cut = 0.0
    for block in range(j):
        for piece in range(k):
            part = W[block::j, piece * IN // k : (piece + 1) * IN // k]
            cut += float(torch.linalg.svdvals(part)[b:].square().sum())
    assert float((term.dense() - W).square().sum().detach()) == pytest.approx(cut, rel=1e-9)
    again = Monarch.from_matrix(term.dense(), k, j, b)
    close(again.dense(), term.dense(), 1e-10)
    assert term.num_params == b * (j * IN + k * OUT)


def test_monarch_s_shares_are_those_of_the_code_s_layer():
    """N = 4: half of a square matrix, 31.25 % of one of 1 to 4."""
    count = METHODS["monarch"].count
    assert count(768, 768, 0, {"blocks": 4}) / 768**2 == 0.5
    assert count(3072, 768, 0, {"blocks": 4}) / (4 * 768**2) == 0.3125
    whole = Monarch.from_matrix(drawn(), 4, 4, 12)
    close(whole.dense(), drawn(), 1e-10)


# --- weight-compander -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
def test_weight_compander_follows_its_lines(learn):
    model = start("weight-compander", None, rho=1.5, learn=learn)
    term = model.layer.terms["companded"]
    a = 2.55 * float(drawn().float().std())
    assert float(term.log_a.exp().detach()) == pytest.approx(a, rel=1e-6)
    inside = drawn().abs() < 0.98 * a * torch.pi / 2
    close(term.dense()[inside], drawn()[inside], 1e-6)
    fixed = (term.log_a.detach().clone(), term.log_b.detach().clone())

    def lines(x: Tensor, V: Tensor, log_a: Tensor = fixed[0], log_b: Tensor = fixed[1]) -> Tensor:
        return x @ (log_a.exp() * torch.atan(V / log_b.exp())).T

    trained = {"V": term.V} | ({"log_a": term.log_a, "log_b": term.log_b} if learn else {})
    follows(model, lines, trained)
    bound = float(term.log_a.exp().detach()) * torch.pi / 2
    assert float(term.dense().abs().max().detach()) < bound
    assert term.log_a.requires_grad == learn


def test_weight_compander_far_from_its_bound_is_plain_training():
    model = start("weight-compander", None, kappa=1e5)
    plain = One(drawn().float()).double()
    plain.layer.weight.data.copy_(model.layer.dense(torch.float64).detach())
    assert run(model, rate=1e-3) == pytest.approx(run(plain, rate=1e-3), rel=1e-6)
