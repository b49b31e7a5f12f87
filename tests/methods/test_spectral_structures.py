"""Structures that keep a singular value decomposition, against plain line-by-line references in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.methods.one_layer import One, close
from tests.methods.test_structures import IN, OUT, STEPS, PlainAdam, batches, drawn, run, start
from weft.errors import WeftError
from weft.methods import METHODS
from weft.methods.base import Site
from weft.rules.ordered_dropout import OrderedDropout, tails
from weft.rules.sampled_vectors import SampledVectors
from weft.rules.sampled_vectors import drawn as draw_places
from weft.seeds import generator, mix
from weft.terms import GatedLowRank, LowRank, SampledSpectral
from weft.verbs.fresh import Structure, finish, restructure

# --- maestro ----------------------------------------------------------------------------------------------------------


def norm_of_tails(B: Tensor, A: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    return [(B[:, j:].norm(), A[j:].norm()) for j in range(rank)]


def test_maestro_follows_its_lines():
    options = {"lasso": 2e-3, "threshold": 0.2, "every": 4}
    model = start("maestro", None, **options)
    term = model.layer.terms["ordered"]
    B, A, rank = term.B.detach().clone(), term.A.detach().clone(), OUT
    adams, losses, ranks = [PlainAdam(), PlainAdam()], [], []
    for step, (x, y) in enumerate(batches(), 1):
        b = 1 + int(torch.randint(rank, (), generator=torch.Generator().manual_seed(mix(0, step))))
        B, A = (t.requires_grad_(True) for t in (B, A))
        loss = (x @ A[:b].T @ B[:, :b].T - y).square().mean()
        lasso = sum(u + v for u, v in ((B[:, j:].norm(), A[j:].norm()) for j in range(rank)))
        grads = torch.autograd.grad(loss + options["lasso"] * lasso, (B, A))
        losses.append(float(loss.detach()))
        B, A = ((t - adam.step(g)).detach() for t, adam, g in zip((B, A), adams, grads, strict=True))
        if step % 4 == 0:
            importance = [float(u * v) for u, v in norm_of_tails(B, A, OUT)]
            rank = max(1, min(rank, sum(value > 0.2 * importance[0] for value in importance)))
            B[:, rank:], A[rank:] = 0.0, 0.0
            ranks.append(rank)
    assert run(model, Structure.of("maestro", None, options)) == pytest.approx(losses, rel=1e-7)
    assert ranks[0] < OUT and ranks[-1] < ranks[0] and int(term.gate.sum()) == rank
    close(term.B * term.gate, B, 1e-6)
    assert not term.B[:, rank:].any() and not term.A[rank:].any()


def test_tails_fall_and_have_a_gradient_at_zero():
    M = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    M[:, 3:] = 0
    found = tails(M.requires_grad_(True))
    close(found, torch.stack([M[:, j:].norm() for j in range(5)]), 1e-6)
    found.sum().backward()
    assert bool(M.grad.isfinite().all()) and not M.grad[:, 3:].any()


def test_layers_and_ranks_are_drawn_uniformly_over_all_pairs():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(24, 24)])
    restructure(model, "maestro")
    rule = OrderedDropout(0.0, every=10_000)
    rule.start(model, steps=20_000)
    counts = torch.zeros(2, 25)
    for step in range(1, 3201):
        rule.open(step)
        widths = [int(term.draw.sum()) for term in rule.gated]
        assert widths[0] == 8 or widths[1] == 24
        counts[int(widths[0] == 8), widths[0] if widths[0] < 8 else widths[1]] += 1
        assert all(bool((term.draw[:w] == 1).all()) for term, w in zip(rule.gated, widths, strict=True))
    assert float(counts[0].sum()) == pytest.approx(7 / 32 * 3200, rel=0.15)  # a full draw of either looks alike
    assert float(counts[1, 1:24].std() / counts[1, 1:24].mean()) < 0.25


def test_ordered_dropout_finds_the_leading_components_of_a_linear_map():
    """Whitened inputs, rank 3: the first b components become the best product of rank b."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(9, 3, generator=draw).double() @ torch.randn(3, 6, generator=draw).double()
    model = restructure(One(torch.randn(9, 6, generator=draw) * 0.1).double(), "maestro")
    term = model.layer.terms["ordered"]
    rule, optimizer = OrderedDropout(0.0, every=3000), torch.optim.SGD(model.parameters(), lr=0.05)
    rule.start(model, steps=4000)
    for step in range(1, 3000):
        loss = 0.5 * (model.train()(torch.eye(6, dtype=torch.float64)).T - target).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rule.after_step(model, step)
    U, s, V = torch.linalg.svd(target, full_matrices=False)
    for b in (1, 2, 3):
        best = (U[:, :b] * s[:b]) @ V[:b]
        assert float((term.B[:, :b] @ term.A[:b] - best).norm().detach() / best.norm()) < 0.05, b


def test_maestro_ends_as_what_is_left():
    model = start("maestro", None)
    term = model.layer.terms["ordered"]
    assert isinstance(term, GatedLowRank)
    with torch.no_grad():
        term.gate[5:] = 0.0
    dense = model.layer.dense()
    finish(model, Structure.of("maestro"))
    left = model.layer.terms["low_rank"]
    assert isinstance(left, LowRank) and left.rank == 5
    close(left.dense(), dense, 1e-12)
    whole = start("maestro", None)
    finish(whole, Structure.of("maestro"))
    assert isinstance(whole.layer, nn.Linear)
    close(whole.layer.weight, drawn(), 1e-5)


# --- sst --------------------------------------------------------------------------------------------------------------


def test_sst_follows_its_lines():
    rank, every = 12, 3  # a round is four draws: an SVD after step 12
    model = start("sst", rank, every=every)
    term = model.layer.terms["spectral"]
    m = min(OUT, IN)
    U, s, V, J = term.U.clone(), term.s.detach().clone(), term.V.clone(), term.active.clone()
    U[:, J] = term.P.detach()
    for_s, for_P, for_Q = (PlainAdam() for _ in range(3))
    losses = []
    for step, (x, y) in enumerate(batches(), 1):
        residual = x @ ((U * s) @ V).T - y
        losses.append(float(residual.square().mean()))
        G = 2.0 / residual.numel() * residual.T @ x
        by_s = torch.stack([U[:, j] @ G @ V[j] for j in range(m)])
        by_P, by_Q = G @ V[J].T, U[:, J].T @ G  # without s
        s = (s - for_s.step(by_s)).clamp(min=0)
        P, Q = U[:, J] - for_P.step(by_P), V[J] - for_Q.step(by_Q)
        U[:, J], V[J] = P / P.norm(dim=0), Q / Q.norm(dim=1, keepdim=True)
        if step % every == 0 and step != STEPS:
            if step // every % 4 == 0:
                U, s, V = torch.linalg.svd((U * s) @ V, full_matrices=False)
                for_s = PlainAdam()
            J = draw_places(s, rank, torch.Generator().manual_seed(mix(0, step, 0)))
            for_P, for_Q = PlainAdam(), PlainAdam()
    structure = Structure.of("sst", rank, {"every": every})
    assert run(model, structure) == pytest.approx(losses, rel=1e-6)
    close(term.dense(), (U * s) @ V, 1e-6)
    assert torch.equal(term.active, J)


def test_sst_starts_as_the_weight_and_trains_few_numbers():
    model = start("sst", 6)
    term = model.layer.terms["spectral"]
    close(model.layer.dense(), drawn(), 1e-5)
    assert isinstance(term, SampledSpectral) and not term.U[:, term.active].any()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6 * (OUT + IN) + OUT
    few, many = torch.randn(3, IN).double(), torch.randn(90, IN).double()
    for x in (few, many):
        close(term(x), x @ term.dense().T, 1e-12)


def test_vectors_rest_while_they_are_not_drawn_and_have_length_one_after_a_step():
    model = start("sst", 6, every=10)
    term = model.layer.terms["spectral"]
    rule = SampledVectors(every=10)
    rule.start(model, steps=100)
    before, resting = term.V.clone(), torch.ones(OUT, dtype=torch.bool).index_fill(0, term.active, False)
    with torch.no_grad():
        term.P.add_(1.0)
        term.s[3] = -1.0
    rule.after_step(model, 1)
    assert torch.equal(term.V[resting], before[resting]) and float(term.s[3]) == 0.0
    close(term.P.norm(dim=0), torch.ones(6), 1e-9)


def test_larger_values_are_drawn_more_often_and_none_is_left_out():
    s, counts, draws = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.zeros(4), 2000
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        counts[draw_places(s, 1, generator)] += 1
    expected = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert bool(((counts / draws - expected).abs() < 4 * (expected / draws).sqrt()).all())
    assert len(set(draw_places(s, 3, generator).tolist())) == 3


def test_the_draws_of_sst_fit_in_the_run():
    model = start("sst", 12)
    for steps, every in ((100, 25), (100_000, 200), (20, 5)):
        rule = SampledVectors()
        rule.start(model, steps=steps)
        assert rule.every == every and rule.round == 4
    with pytest.raises(WeftError, match=r"draws of vectors \(every\) is 20 steps and the run has 20"):
        SampledVectors(every=20).start(model, steps=20)


@pytest.mark.parametrize(
    ("method", "rank", "options", "sentence"),
    [
        ("maestro", None, {"threshold": 1.0}, "threshold is 1.0: give a share"),
        ("maestro", None, {"lasso": -1.0}, "lasso of 'maestro' is -1.0"),
        ("maestro", 4, {}, "--rank has no meaning for --method maestro"),
        ("sst", 65, {}, "Rank 65 is not possible for sst"),
    ],
)
def test_wrong_options_are_sentences(method, rank, options, sentence):
    with pytest.raises(WeftError, match=sentence):
        structure = Structure.of(method, rank, options)
        structure.rules(restructure(One(drawn().float()), structure), 0)


def test_maestro_keeps_every_live_component_in_half_precision() -> None:
    draw = torch.Generator().manual_seed(0)
    B, A = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((768, 768), (768, 768)))
    gate = (torch.arange(768) < 301).bfloat16()
    term = GatedLowRank.from_factors(B * gate, A * gate.unsqueeze(1), gate)
    made = METHODS["maestro"].finish(Site("layer", {"ordered": term}, None, None, {}, generator(0, "")))
    (kept,) = made.terms.values()
    assert isinstance(kept, LowRank) and kept.rank == 301
