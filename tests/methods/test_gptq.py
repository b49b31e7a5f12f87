"""GPTQ against a reference that takes the inverse Hessian apart column by column, without blocks and without Cholesky;
its identities; and its place in the sequential walk."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from benchmarks.operations import Operations
from weft.errors import WeftError
from weft.kernels.integer_grid import fit, grouped, to_codes
from weft.linalg.column_errors import columns
from weft.methods import METHODS
from weft.methods.base import Site
from weft.methods.gptq import Codes, quantise
from weft.methods.rtn import sizes
from weft.stats.calibrate import calibrate
from weft.terms import Dense
from weft.terms.layers import linear_layers, weight_of
from weft.testing_adapters import task, tiny_llama
from weft.verbs.compress import compress
from weft.verbs.quantize import quantize


def layer(out=12, inn=50, tokens=200, seed=0):
    """A weight and the second moment of correlated inputs, in fp64; one input is always zero."""
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((tokens, inn)) @ draw.standard_normal((inn, inn)) * draw.gamma(1.0, size=inn)
    X[:, 7] = 0
    return torch.from_numpy(draw.standard_normal((out, inn))), torch.from_numpy(X.T @ X / tokens)


def reference(W, H, bits, group, symmetric=False, act_order=False, damping=0.01):
    """Row by row, column by column: after a column is rounded, it is eliminated from the inverse of H."""
    W, H, (out, inn) = W.numpy().copy(), H.numpy().copy(), W.shape
    for j in range(inn):
        if H[j, j] == 0:
            H[j, j], W[:, j] = 1, 0
    order = sorted(range(inn), key=lambda j: -H[j, j]) if act_order else list(range(inn))
    mean = sum(H[j, j] for j in range(inn)) / inn
    inverse = np.linalg.inv(H + damping * mean * np.eye(inn))
    start, answer, last = W.copy(), np.zeros_like(W), 2**bits - 1
    grids = {}
    for step, j in enumerate(order):
        for i in range(out):
            g = j // group
            if (i, g) not in grids:
                members = (start if act_order else W)[i, g * group : (g + 1) * group]
                low, high = min(members.min(), 0), max(members.max(), 0)
                if symmetric:
                    high = max(high, -low)
                    low = -high
                scale = (high - low) / last
                grids[i, g] = scale, 2 ** (bits - 1) if symmetric else round(-low / scale)
            scale, zero = grids[i, g]
            code = min(max(round(W[i, j] / scale) + zero, 0), last)
            answer[i, j] = (code - zero) * scale
            error = (W[i, j] - answer[i, j]) / inverse[j, j]
            for k in order[step + 1 :]:
                W[i, k] -= error * inverse[j, k]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(answer)


def dense(found, group):
    """The matrix (out, in) of codes."""
    scale, zero = (t.repeat_interleave(group, 1)[:, : found.codes.shape[1]] for t in (found.scale, found.zero))
    return (found.codes - zero) * scale


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(3, 16, False), (4, 50, False), (4, 8, True), (2, 20, False)])
def test_equals_a_reference_that_shares_no_code(bits, group, symmetric, act_order):
    W, H = layer()
    found = dense(quantise(W, columns(H, by_input=act_order), bits, group, symmetric=symmetric), group)
    torch.testing.assert_close(found, reference(W, H, bits, group, symmetric, act_order), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("clip", "symmetric"), [(True, False), (False, True)])
def test_widths_that_are_walked_over_together_are_those_of_each_alone(clip, symmetric, act_order):
    W, H = layer()
    how, widths = columns(H, by_input=act_order), (2, 5, 8)
    rule = {"clip": clip, "symmetric": symmetric}
    together = quantise(W.repeat(3, 1), how, torch.tensor(widths).repeat_interleave(len(W)), 16, **rule)
    for i, bits in enumerate(widths):
        part = Codes(*(t[12 * i : 12 * i + 12] for t in together))
        torch.testing.assert_close(dense(part, 16), dense(quantise(W, how, bits, 16, **rule), 16))


@pytest.mark.parametrize("room", [2**24, 1])
def test_how_many_widths_fit_changes_nothing(monkeypatch, room):
    monkeypatch.setattr("weft.methods.gptq._NUMBERS", room)
    W, H = (t.float() for t in layer())
    site = Site("l", {"base": Dense.from_matrix(W)}, None, None, {"input_moment": H}, torch.Generator())
    options = METHODS["gptq"].options({"group": 16, "clip": True})
    found = {bits: split.terms["base"] for bits, split in METHODS["gptq"].each(site, [3, 2, 8], options)}
    assert list(found) == [3, 2, 8]
    for bits, term in found.items():
        alone = quantise(W, columns(H), bits, 16, clip=True, scale_dtype=torch.float16)
        assert term.bits == bits
        torch.testing.assert_close(term.dense(), dense(alone, 16))


def test_a_gpu_is_waited_for_a_few_times_a_group_and_started_a_few_times_a_column():
    W, H = layer(out=6, inn=128, tokens=300)
    how, counts = columns(H), {}
    for count in (1, 3):
        with Operations() as counted:
            bits = torch.tensor([2, 4, 8][:count]).repeat_interleave(6)
            quantise(W.repeat(count, 1), how, bits, 32, clip=True, scale_dtype=torch.float16)
        counts[count] = counted.total
        assert counted.waits.total() <= 1 + 5 * 4  # once at the end, and once a round of the search in each group
    assert counts[1] <= 8 * 128 + 600 * 4 and counts[3] <= 1.1 * counts[1] + 100


def test_long_matrices_do_not_depend_on_their_blocks(monkeypatch):
    W, H = layer(out=4, inn=300, tokens=900)
    answers = []
    for block in (1, 32, 128, 300):
        monkeypatch.setattr("weft.methods.gptq._BLOCK", block)
        answers += [dense(quantise(W, columns(H), 3, group), group) for group in (32, 200, 300)]
    for i in range(3):
        for other in answers[i::3]:
            torch.testing.assert_close(other, answers[i], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(answers[0], reference(W, H, 3, 32), atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_sum_of_the_errors_squared():
    W, H = layer()
    H[7, 7] = 1.0  # no column is dead
    how = columns(H)
    D = W - dense(quantise(W, how, 3, 16), 16)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(50, dtype=H.dtype)
    torch.testing.assert_close(how.root.mT @ how.root, torch.linalg.inv(damped))
    # e U = D, column after column: the errors are those of the triangular system
    errors = torch.linalg.solve_triangular(how.root, D, upper=True, left=False)
    torch.testing.assert_close((D @ damped * D).sum(), errors.square().sum())


def test_uncorrelated_inputs_give_the_nearest_and_correlated_ones_something_better():
    W, H = layer()
    H[7, 7] = 1.0
    groups = grouped(W, 10)
    grid = fit(groups, 3)
    nearest = grid.values(to_codes(groups, grid)).flatten(1)
    plain = dense(quantise(W, columns(torch.diag(H.diagonal())), 3, 10), 10)
    torch.testing.assert_close(plain, nearest)
    better = dense(quantise(W, columns(H), 3, 10), 10)
    loss, least = (float(((W - Q) @ H * (W - Q)).sum()) for Q in (nearest, better))
    assert least < 0.7 * loss


@pytest.mark.parametrize("act_order", [False, True])
def test_what_lies_on_the_grid_stays_and_a_column_without_input_becomes_zero(act_order):
    _, H = layer()
    codes = torch.randint(0, 16, (12, 5, 10), generator=torch.Generator().manual_seed(0)).double()
    codes[:, :, 0], codes[:, :, 1] = 0, 15  # both ends of the range, so that the grid is the one that is found
    scale, zero = (torch.rand(12, 5, 1) + 0.5).double(), codes[:, :, 2:3]
    on_grid = ((codes - zero) * scale).flatten(1)
    found = dense(quantise(on_grid, columns(H, by_input=act_order), 4, 10), 10)
    on_grid[:, 7] = 0
    torch.testing.assert_close(found, on_grid)


def test_the_walk_gives_each_layer_the_inputs_of_the_model_quantised_so_far():
    """In order of the forward pass, by hand: calibrate on the model as it is now, round one layer, go on."""
    original, model = tiny_llama(), tiny_llama()
    compress(model, "gptq", allocate=dict.fromkeys(linear_layers(original), 3), batches=task(), group=16)
    by_hand = copy.deepcopy(original)
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        names = [
            name for name in linear_layers(original) if name.startswith("model.layers.0.") and name.endswith(group)
        ]
        stats = calibrate(by_hand, task(), ("input_moment",), layers=names)
        for name in names:
            W = weight_of(by_hand.get_submodule(name))
            found = quantise(W, columns(stats[name]["input_moment"]), 3, 16, scale_dtype=torch.float16)
            by_hand.get_submodule(name).weight.data.copy_(dense(found, 16))
            torch.testing.assert_close(weight_of(model.get_submodule(name)), dense(found, 16), atol=1e-5, rtol=1e-4)


def test_the_bytes_are_those_of_the_formula():
    for bits, nbytes in sizes((48, 64), {"bits": None, "group": 16, "symmetric": False}):
        assert nbytes == 48 * 64 * bits // 8 + 48 * 4 * 2 + 48 * 4 * bits // 8


def test_a_weight_beyond_the_scales_is_refused_by_its_layer():
    W, H = (t.float() for t in layer())
    site = Site("that one", {"base": Dense.from_matrix(W * 1e6)}, 4, 4, {"input_moment": H}, torch.Generator())
    for options in ({}, {"clip": True}):
        with pytest.raises(WeftError, match="Layer that one cannot be coded: a scale is beyond torch.float16"):
            METHODS["gptq"].split(site, **METHODS["gptq"].options(options))


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(WeftError, match="gptq looks at calibration text: use weft compress MODEL --method gptq"):
        quantize(tiny_llama(), "gptq")
    with pytest.raises(WeftError, match="A group of 0 inputs is none"):
        compress(tiny_llama(), "rtn", budget="4 bits", group=0)
    with pytest.raises(WeftError, match="rtn has 2, 3, 4, 5, 6, 7, 8 bits, not 9; give one of them"):
        quantize(tiny_llama(), "rtn", bits=9)
    with pytest.raises(WeftError, match="the smallest sizes take"):
        compress(tiny_llama(), METHODS["rtn"], budget="1 bit")


def test_a_moment_that_leaves_directions_out_needs_damping():
    with pytest.raises(WeftError, match="A moment of 3 x 3 cannot be inverted with a damping of 0: give a larger one"):
        columns(torch.ones(3, 3, dtype=torch.float64), damping=0)
    assert columns(torch.ones(3, 3, dtype=torch.float64), damping=0.01).root.isfinite().all()
