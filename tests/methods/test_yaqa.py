"""YAQA against rounding in one long vector, with the whole Kronecker product taken apart; its identities; where it is
GPTQ; and what it loses beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.operations import Operations
from weft.embedded.text import default_text
from weft.errors import WeftError
from weft.kernels.codebooks import fit_scales
from weft.kernels.integer_grid import fit, grouped
from weft.linalg import two_sided
from weft.linalg.column_errors import columns, feedback
from weft.linalg.grids import Grids
from weft.methods import METHODS, gptq
from weft.methods.base import Shape, Site
from weft.methods.yaqa import quantise, tables_of, to_tables
from weft.runs.loading import load_model, load_tokenizer
from weft.stats.calibrate import calibrate
from weft.terms import Dense
from weft.terms.layers import linear_layers
from weft.testing_adapters import task, tiny_llama
from weft.train.windows import calibration_batches
from weft.verbs.compress import compress


def layer(out=9, inn=20, tokens=200, seed=0):
    """A weight, and the second moments of correlated inputs and of gradients, in fp64."""
    draw = np.random.default_rng(seed)

    def moment(n):
        x = draw.standard_normal((tokens, n)) @ draw.standard_normal((n, n)) * draw.gamma(1.0, size=n)
        return torch.from_numpy(x.T @ x / tokens)

    return torch.from_numpy(draw.standard_normal((out, inn))), moment(inn), moment(out)


def damped(H):
    return H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def rounded(W, X, G, bits, group, **rule):
    """The matrix (out, in) of codes of one width."""
    A, B = (feedback(columns(H).root) for H in (G, X))
    return dense(quantise(W, A, B, torch.tensor([bits]), group, **rule), group)


def dense(found, group):
    scale, zero = (t.repeat_interleave(group, 1)[:, : found.codes.shape[1]] for t in (found.scale, found.zero))
    return (found.codes - zero) * scale


def lost(D, X, G):
    return float(torch.einsum("oi,op,pj,ij->", D, G, D, X))


def on_grid(bits):
    """The numbers (2^bits,) that members of a group (1, n) can become."""

    def numbers(members):
        scale, zero, _ = fit(members, bits)
        return ((torch.arange(2**bits) - zero) * scale)[0]

    return numbers


def reference(W, X, G, numbers, group, tile):
    """W as one vector, and the inverse of the whole matrix of the loss, from which number after number is eliminated.
    Grids are those of a tile's rows when its first number is reached; lower tiles of a step come first, since a grid
    knows of the steps before it only."""
    out, inn = W.shape
    inverse = torch.linalg.inv(torch.kron(damped(G), damped(X)))
    w, answer, grids = W.flatten().clone(), torch.zeros(out * inn, dtype=W.dtype), {}
    tiles = [(r, c) for r in range(0, out, tile) for c in range(0, inn, tile)]
    for top, left in sorted(
        tiles, key=lambda at: (sum(at), at[1])
    ):  # lower ones first: a grid knows earlier steps only
        for i in range(top, min(top + tile, out)):
            for j in range(left, min(left + tile, inn)):
                if j % group == 0 and (i, j) == (top, left):
                    for row in range(top, min(top + tile, out)):
                        grids[row, j // group] = numbers(w.view(out, inn)[row : row + 1, j : j + group])
                at, found = i * inn + j, grids[i, j // group]
                answer[at] = found[(found - w[at]).abs().argmin()]
                e = (w[at] - answer[at]) / inverse[at, at]
                w -= e * inverse[at]
                inverse -= torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
                w[at], inverse[at, at] = answer[at], 1.0
    return answer.view(out, inn)


@pytest.mark.parametrize(
    ("out", "inn", "group", "tile"), [(9, 20, 4, 4), (6, 14, 14, 14), (10, 12, 8, 4), (5, 8, 4, 2)]
)
def test_equals_rounding_in_the_whole_kronecker_product(monkeypatch, out, inn, group, tile):
    monkeypatch.setattr(two_sided, "_TILE", tile)
    W, X, G = layer(out, inn)
    torch.testing.assert_close(
        rounded(W, X, G, 3, group), reference(W, X, G, on_grid(3), group, tile), atol=1e-6, rtol=1e-6
    )


TABLES = torch.tensor([[-0.7, 0.5, 0.5, 0.5, 0.5], [-0.9, -0.2, 0.1, 0.6, 0.6]], dtype=torch.float64)
"""Of 1 bit and of 2: the last of the shorter one is repeated, and so is one within."""


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("out", "inn", "group", "tile"), [(9, 20, 4, 4), (6, 14, 14, 14), (10, 12, 8, 4)])
def test_with_tables_too(monkeypatch, out, inn, group, tile, clip):
    monkeypatch.setattr(two_sided, "_TILE", tile)
    W, X, G = layer(out, inn)
    A, B = (feedback(columns(H).root) for H in (G, X))
    found = to_tables(W, A, B, TABLES, group, clip=clip)
    for table, codes, scale in zip(TABLES, *found, strict=True):
        assert codes.max() <= (table < table.max()).sum(), "no code of a repetition"
        ours = table[codes.long()] * scale.repeat_interleave(group, 1)[:, :inn]
        wanted = reference(W, X, G, lambda members: table * fit_scales(members, table, clip=clip)[0], group, tile)  # noqa: B023
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_the_scale_of_a_group_is_its_largest_or_the_best_of_fifteen(clip):
    numbers, table = layer(7, 30)[0].view(7, 3, 10), TABLES[1]
    found = fit_scales(numbers, table, clip=clip, scale_dtype=torch.float16)
    for row, scale in zip(numbers.flatten(0, 1), found.flatten(), strict=True):
        tried = (
            [float((row.abs().max() * (1.2 - i / 20)).half()) for i in range(15)]
            if clip
            else [float(row.abs().max().half())]
        )
        lost = [float(((row[:, None] - table * s).abs().amin(1) ** 2.4).sum()) for s in tried]
        at = min(range(len(tried)), key=lambda i: abs(tried[i] - float(scale)))
        assert float(scale) == pytest.approx(tried[at], rel=1e-9)
        assert lost[at] < 1.02 * min(lost), "what a number loses is read from a table"


def test_a_table_is_what_k_means_finds_of_numbers_relative_to_their_groups_largest():
    W, X, _ = layer(8, 20)
    found = tables_of(W, X.diagonal(), [1, 3], 8)
    assert found.shape == (2, 8) and bool((found[0, 2:] == found[0, 1]).all())
    largest = grouped(W, 8).abs().amax(2).repeat_interleave(8, 1)[:, :20]
    units, weights = W / largest, largest.square() * X.diagonal()
    owner = (units.unsqueeze(2) - found[1]).abs().argmin(2)
    for k, level in enumerate(found[1]):
        mine = owner == k
        assert float(level) == pytest.approx(float((units * weights)[mine].sum() / weights[mine].sum()), abs=1e-6)


def test_a_table_loses_less_than_a_grid_of_more_bytes():
    """Of trained weights, and of moments that a text has."""
    model, data = load_model("pico"), {"windows": 4, "window": 128, "seed": 0}
    batches = list(calibration_batches(load_tokenizer("pico"), [default_text("calibration")], **data))
    name = "model.layers.2.self_attn.q_proj"
    moments = calibrate(model, batches, METHODS["yaqa"].needs, layers=name)[name]
    W = model.get_submodule(name).weight.detach().float()
    for bits in (2, 3, 4):
        site, made = Site("", {"base": Dense.from_matrix(W)}, bits, bits, moments, torch.Generator()), []
        for table in (False, True):
            options = METHODS["yaqa"].options({"group": 128, "clip": True, "table": table})
            (term,) = METHODS["yaqa"].split(site, **options).terms.values()
            made.append((lost((W - term.dense()).double(), *map(moments.get, METHODS["yaqa"].needs)), term.nbytes))
            assert dict(METHODS["yaqa"].sizes(Shape(*W.shape), options))[bits] == term.nbytes
        assert made[1][0] < 0.95 * made[0][0] and made[1][1] < made[0][1], (bits, made)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"bits": 6}, "Tables have 1 to 5 bits here, not 6"), ({"symmetric": True}, "A table has no zero point")],
)
def test_tables_that_there_are_not_are_refused(options, sentence):
    with pytest.raises(WeftError, match=sentence):
        METHODS["yaqa"].sizes(Shape(8, 8), METHODS["yaqa"].options({"table": True, **options}))


def test_the_loss_is_the_sum_of_the_errors_squared():
    W, X, G = layer()
    A, B = (columns(H).root for H in (G, X))
    D = W - rounded(W, X, G, 3, 4)
    errors = torch.linalg.solve_triangular(
        B, torch.linalg.solve_triangular(A.mT, D, upper=False), upper=True, left=False
    )
    assert lost(D, damped(X), damped(G)) == pytest.approx(float(errors.square().sum()), rel=1e-9)


def test_outputs_that_weigh_alone_are_rounded_as_gptq_does():
    W, X, _ = layer(out=70, inn=96)
    G = torch.diag(torch.rand(70, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1)
    for group in (16, 32, 96):
        found = rounded(W, X, G, 4, group, clip=True)
        wanted = dense(gptq.quantise(W, columns(X), 4, group, clip=True), group)
        torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("group", [16, 24, 96])
def test_outputs_that_weigh_together_lose_less_than_with_gptq(group):
    """Not a law of every draw; of five, by a tenth."""
    ours = theirs = 0.0
    for seed in range(5):
        draw = np.random.default_rng(seed)
        W, (X, G) = torch.from_numpy(draw.standard_normal((40, 96))), map(torch.from_numpy, _decaying(draw, 96, 40))
        ours += lost(W - rounded(W, X, G, 3, group), X, G)
        theirs += lost(W - dense(gptq.quantise(W, columns(X), 3, group), group), X, G)
    assert ours < 0.9 * theirs


def _decaying(draw, *sides):
    """Moments in whose random directions the energy falls as 1 / k."""
    for side in sides:
        Q, _ = np.linalg.qr(draw.standard_normal((side, side)))
        yield (Q / np.arange(1, side + 1)) @ Q.T


@pytest.mark.parametrize("symmetric", [False, True])
def test_widths_that_are_walked_over_together_are_those_of_each_alone(symmetric):
    W, X, G = (t.float() for t in layer(40, 70))
    A, B = (feedback(columns(H).root) for H in (G, X))
    rule = {"clip": True, "symmetric": symmetric, "scale_dtype": torch.float16}
    together = quantise(W, A, B, torch.tensor([2, 5, 8]), 16, **rule)
    for i, bits in enumerate((2, 5, 8)):
        part = gptq.Codes(*(t[40 * i : 40 * i + 40] for t in together))
        torch.testing.assert_close(dense(part, 16), rounded(W, X, G, bits, 16, **rule))


def test_what_lies_on_the_grid_stays():
    _, X, G = layer(12, 50)
    codes = torch.randint(0, 16, (12, 5, 10), generator=torch.Generator().manual_seed(0)).double()
    codes[:, :, 0], codes[:, :, 1] = 0, 15  # both ends of the range, so that the grid is the one that is found
    scale = (torch.rand(12, 5, 1) + 0.5).double()
    on_grid = ((codes - codes[:, :, 2:3]) * scale).flatten(1)
    torch.testing.assert_close(rounded(on_grid, X, G, 4, 10), on_grid)


def test_outputs_without_gradient_and_inputs_that_never_come():
    """A column without input becomes zero; a row without gradient is rounded, and moves no other."""
    W, X, G = layer(9, 20)
    X[3], X[:, 3], G[8], G[:, 8] = 0, 0, 0, 0
    G /= G.diagonal()[:8].mean()  # a dead row counts as 1 in the mean, so that the damping is the same without it

    def found(rows):
        moments = {"input_moment": X, "output_grad_moment": G[:rows, :rows]}
        site = Site("l", {"base": Dense.from_matrix(W[:rows])}, 4, 4, moments, torch.Generator())
        return METHODS["yaqa"].split(site, **METHODS["yaqa"].options({"group": 4})).terms["base"].dense(torch.float64)

    whole = found(9)
    assert not whole[:, 3].any() and (whole[8, :3] - W[8, :3]).abs().max() < 0.5
    torch.testing.assert_close(whole[:8], found(8))


@pytest.mark.parametrize("options", [{}, {"clip": True}, {"symmetric": True, "damping": 0.2}, {"output_damping": 0.01}])
def test_a_layer_is_rounded_as_its_options_say(options):
    W, X, G = (t.float() for t in layer(12, 40))
    moments = {"input_moment": X, "output_grad_moment": G}
    site = Site("l", {"base": Dense.from_matrix(W)}, 3, 3, moments, torch.Generator())
    given = {"clip": False, "symmetric": False, "damping": 0.01, "output_damping": 1.0} | options
    A, B = (feedback(columns(H, damping=given.pop(f"{which}damping")).root) for which, H in (("output_", G), ("", X)))
    wanted = dense(quantise(W, A, B, torch.tensor([3]), 8, **given, scale_dtype=torch.float16), 8)
    found = METHODS["yaqa"].split(site, **METHODS["yaqa"].options({"group": 8, **options})).terms["base"]
    torch.testing.assert_close(found.dense(torch.float32), wanted)


def test_the_steps_grow_with_the_sides_and_not_with_the_numbers():
    counts = {}
    for out, inn in ((64, 128), (128, 256)):
        W, X, G = layer(out, inn, tokens=400)
        A, B = (feedback(columns(H).root) for H in (G, X))
        with Operations() as counted:
            quantise(W, A, B, torch.tensor([3]), 32)
        counts[out] = counted.total
    assert counts[128] < 2.6 * counts[64]


def test_groups_that_are_reached_together_have_their_grids_found_together():
    """A search of ranges takes hundreds of operations: one a step, not one a group of rows."""
    W, X, G = layer(128, 128, tokens=400)
    A, B = (feedback(columns(H).root) for H in (G, X))
    calls = []
    found = two_sided.settle(W.unsqueeze(0), A, B, 32, lambda numbers: calls.append(numbers.shape) or _halves(numbers))
    assert len(calls) == 7 and sum(shape[1] for shape in calls) == 16
    assert [float(end) for end in found.codes.aminmax()] == [-1, 2]


def _halves(numbers):
    scale = numbers.abs().mean(3, keepdim=True)
    return Grids.of(scale, torch.ones_like(scale), 2)


def test_compress_loses_less_of_the_model_than_gptq_at_equal_bytes():
    predicted = {}
    for method in ("gptq", "yaqa"):
        model = tiny_llama()
        done = compress(model, method, budget="3.5 bits", allocate="best", batches=task(), group=16)
        predicted[method] = sum(choice.loss for choice in done.allocation.choices.values())
        assert set(done.allocation.choices) == set(linear_layers(tiny_llama()))
    assert predicted["yaqa"] < 0.9 * predicted["gptq"]


def test_a_weight_beyond_the_scales_is_refused_by_its_layer():
    W, X, G = (t.float() for t in layer())
    moments = {"input_moment": X, "output_grad_moment": G}
    site = Site("that one", {"base": Dense.from_matrix(W * 1e6)}, 4, 4, moments, torch.Generator())
    with pytest.raises(WeftError, match="Layer that one cannot be coded: a scale is beyond torch.float16"):
        METHODS["yaqa"].split(site, **METHODS["yaqa"].options({"group": 4}))
    assert grouped(W, 4).shape == (9, 5, 4)
