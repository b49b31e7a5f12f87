"""dqt: numbers of 8 bits that are trained as they are stored, against the plain formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.processes import launched
from weft.errors import WeftError
from weft.kernels.float_format import float_codes, float_values
from weft.rules.rounded_steps import RoundedSteps
from weft.seeds import mix
from weft.terms import FloatCode, SumLinear, TrainedFloat
from weft.train.optimizers import make_optimizer
from weft.verbs.fresh import Structure, finish, restructure

OUT, IN = 12, 10


class One(nn.Module):
    def __init__(self, W: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)
        self.layer.weight = nn.Parameter(W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def drawn(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (OUT, IN), generator=torch.Generator().manual_seed(seed))


def begun(steps: int = 6, **options: float) -> tuple[One, TrainedFloat, RoundedSteps, torch.optim.Optimizer]:
    model = One(drawn())
    structure = Structure.of("dqt", None, options)
    restructure(model, structure)
    (rule,) = structure.rules(model, 3)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.02, weight_decay=0.1)
    rule.bind(optimizer)
    rule.start(model, steps=steps)
    return model.train(), model.layer.terms["code"], rule, optimizer


def beside(v: torch.Tensor, element: torch.dtype, u: torch.Tensor) -> torch.Tensor:
    """Of the two numbers of the format beside each of v, the one that the uniform draws u choose."""
    every = torch.arange(256, dtype=torch.uint8).view(element).float()
    sizes = every[every.isfinite() & (every >= 0)].sort().values.unique()
    size = v.abs().clamp(max=float(sizes[-1]))
    at = (torch.searchsorted(sizes, size, right=True) - 1).clamp(max=len(sizes) - 2)
    low, high = sizes[at], sizes[at + 1]
    return torch.where(u >= 1 - (size - low) / (high - low), high, low) * v.sign()


@pytest.mark.parametrize(("element", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_dqt_follows_its_lines(element, dtype):
    model, term, rule, optimizer = begun(element=element)
    scale, W = float(term.scale_matrix()[0]), term.dense()
    m = v = torch.zeros(OUT, IN)
    for step in range(1, 7):
        optimizer.param_groups[0]["lr"] = lr = 0.02 * step  # a schedule's
        x, y = drawn(step, 7, IN), drawn(step + 50, 7, OUT)
        residual = x @ W.T - y
        loss = (model(x) - y).square().mean()
        assert float(loss.detach()) == pytest.approx(float(residual.square().mean()), rel=1e-5)
        for rows in (slice(3), slice(3, None)):  # two micro-batches
            ((model(x[rows]) - y[rows]).square().sum() / y.numel()).backward()
        rule.before_step(model, step)
        rule.after_step(model, step)
        G = 2 / residual.numel() * residual.T @ x
        m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
        update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        u = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(mix(3, step, 0)))
        W = scale * beside((W * (1 - lr * 0.1) - lr * update) / scale, dtype, u)
        wrong = ~torch.isclose(term.dense(), W, rtol=1e-6)
        assert int(wrong.sum()) <= 1, f"{int(wrong.sum())} numbers are others"  # a draw at the very edge
        W = term.dense()
    assert term.probe is None, "the run has ended"


def test_rounding_keeps_the_mean_and_takes_neighbours_alone():
    numbers = torch.tensor([0.3, -1.1, 5.0, 447.0, 1e-3, 0.0, -2.0, 1e4]).repeat(20000, 1)
    found = float_values(float_codes(numbers, "e4m3", torch.Generator().manual_seed(0)), "e4m3")
    assert all(len(column.unique()) <= 2 for column in found.mT)
    spread = found.std(0) / 20000**0.5
    wanted = numbers[0].clamp(max=448)
    assert bool(((found.mean(0) - wanted).abs() <= 5 * spread + 1e-6).all())
    exact = torch.tensor([0.0, -2.0, 448.0])
    assert torch.equal(found[:, 5:], exact.expand(20000, 3)), "what the format has is never moved"


def test_steps_below_half_a_number_move_weights_on_average():
    model, term, rule, optimizer = begun(steps=200)
    optimizer.param_groups[0]["lr"], optimizer.defaults["weight_decay"] = 2e-4, 0.0
    before = term.dense()
    for step in range(1, 201):
        model(torch.ones(1, IN)).sum().backward()  # the same gradient always: W falls by lr a step
        rule.before_step(model, step)
    assert float((term.dense() - before).mean()) == pytest.approx(-200 * 2e-4, rel=0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw_fp8", "adamw_8bit"])
def test_weight_decay_reaches_the_numbers_whatever_optimizer_has_the_rest(name):
    _, term, rule, _ = begun()
    rest = nn.Sequential(nn.Linear(4, 4))
    rule.bind(make_optimizer(name, rest, 1.0, 0.25, 0, {}))
    rule.inner = replace(rule.inner, betas=(0.0, 0.999), eps=1e30)  # no step but the decay's
    before = term.dense()
    rule.pulls = [torch.zeros(OUT, IN)]
    rule.before_step(One(drawn()), 1)
    assert float(term.dense().norm() / before.norm()) == pytest.approx(0.75, rel=0.02)


def test_a_weight_takes_a_byte_and_its_moments_two():
    term = TrainedFloat.of(drawn(0, 64, 256), "e4m3", 4)
    assert term.nbytes == 64 * 256 + 4 * 64 and not list(term.parameters())
    rule = RoundedSteps(0)
    rule.start(model_of(term), steps=4)
    held = sum(t.nbytes for t in rule.state_dict().values())
    assert held == 2 * 64 * 256 + 2 * 64 * 4


def model_of(term: TrainedFloat) -> nn.Module:
    return nn.Sequential(SumLinear({"code": term}))


def test_numbers_may_grow_as_far_as_said():
    W = drawn()
    for headroom in (0, 4):
        term = TrainedFloat.of(W, "e4m3", headroom)
        assert float((term.dense() - W).abs().max()) <= float(W.abs().max()) * 2**-4
        term.store(W * 100)
        most = float(term.dense().abs().max() / W.abs().max())
        assert 2**headroom * 448 / 512 <= most <= 2 ** (headroom + 1)


def process(rank: int, directory: str) -> None:
    """Four steps on every other row of the batches of `trained`."""
    torch.distributed.init_process_group("gloo")
    torch.save(trained(rows=slice(rank, None, 2)), Path(directory) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def trained(rows: slice) -> torch.Tensor:
    model, term, rule, _ = begun()
    for step in range(1, 5):
        x, y = drawn(step, 8, IN)[rows], drawn(step + 50, 8, OUT)[rows]
        (model(x) - y).square().mean().backward()
        rule.before_step(model, step)
    return term.codes.clone()


@pytest.mark.distributed
def test_two_processes_take_the_steps_of_one(tmp_path):
    launched(process, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one, two)
    alone = trained(slice(None))
    assert int((one != alone).sum()) <= 2, "but for a draw at the very edge"
    assert int((one != trained(slice(0, None, 2))).sum()) > 10, "each process has steps of its own"


def test_what_comes_out_is_an_fp8_model():
    model, term, rule, _ = begun()
    model(drawn(1, 7, IN)).sum().backward()
    rule.before_step(model, 1)
    W = term.dense()
    finish(model, Structure.of("dqt"))
    (code,) = model.layer.terms.values()
    assert type(code) is FloatCode and torch.equal(code.dense(), W)
    assert code.exact_floats().element == "e4m3" and not code.exact_floats().shared, "as fp8's, which formats hold"


def test_what_cannot_be_is_said():
    with pytest.raises(WeftError, match="trained in 8 bits are e4m3 or e5m2, not 'e2m1'"):
        begun(element="e2m1")
    with pytest.raises(WeftError, match="headroom is 9: numbers may grow"):
        begun(headroom=9)
    model, _, rule, _ = begun()
    with pytest.raises(WeftError, match="No gradient has reached the numbers of 8 bits"):
        rule.before_step(model, 1)
    with pytest.raises(WeftError, match="choose --method dqt"):
        RoundedSteps(0).start(nn.Sequential(), steps=2)
