"""The norm test: unbiased estimates from micro-batches, and the batch that follows from them."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.optim import adaptive_worker as worker
from tests.processes import together
from weft.errors import WeftError
from weft.optim import AdaptiveBatch
from weft.optim.adaptive_batch import noise_estimates


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def estimates(groups: Tensor, samples: int) -> tuple[float, float]:
    """From the gradients (J, d) of micro-batches."""
    return noise_estimates(float(groups.square().sum()), float(groups.mean(0).square().sum()), len(groups), samples)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 99))
def test_micro_batches_of_one_sample_give_the_variance_of_samples(count: int, width: int, seed: int) -> None:
    g = torch.randn(count, width, generator=rng(seed), dtype=torch.float64) + 1
    s2, signal = estimates(g, 1)
    assert s2 == pytest.approx(float(g.var(0).sum()), rel=1e-9)
    assert signal == pytest.approx(float(g.mean(0).square().sum()) - s2 / count, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("samples", [1, 4])
def test_both_estimates_are_unbiased(samples: int) -> None:
    """Over 4000 draws of 8 groups: trace(Sigma) and ||G||^2 within 1 %."""
    width, groups, draws = 20, 8, 4000
    scale, mean = torch.linspace(0.5, 2, width, dtype=torch.float64), torch.full((width,), 0.7, dtype=torch.float64)
    g = mean + scale / samples**0.5 * torch.randn(draws, groups, width, generator=rng(), dtype=torch.float64)
    s2, signal = noise_estimates(g.square().sum((1, 2)), g.mean(1).square().sum(1), groups, samples)  # type: ignore[arg-type]
    assert float(torch.as_tensor(s2).mean()) == pytest.approx(float(scale.square().sum()), rel=0.01)
    assert float(torch.as_tensor(signal).mean()) == pytest.approx(float(mean.square().sum()), rel=0.01)


def simulate(batch: AdaptiveBatch, w: nn.Parameter, mean: Tensor, deviation: float, seed: int) -> int:
    """A step on samples whose gradients are normal."""
    generator, w.grad = rng(seed), None
    for _ in range(batch.accumulation):
        noise = torch.randn(batch.micro, len(mean), generator=generator, dtype=mean.dtype)
        ((w * (mean + deviation * noise.mean(0))).sum() / batch.accumulation).backward()
    return batch.update()


def controller(width: int = 50, **options: Any) -> tuple[AdaptiveBatch, nn.Parameter]:
    w = nn.Parameter(torch.zeros(width, dtype=torch.float64))
    settings = {"micro": 2, "start": 16, "limit": 4096, "eta": 0.5, "every": 1, "beta": 0.0} | options
    return AdaptiveBatch([w], **settings), w


def test_the_batch_grows_to_the_noise_scale_over_eta_squared() -> None:
    """Known mean and variance: trace / (eta^2 ||G||^2) = 50 * 4 / (0.25 * 4) = 200."""
    batch, w = controller(beta=0.9, every=5)
    mean = torch.full((50,), math.sqrt(4 / 50), dtype=torch.float64)
    sizes = [simulate(batch, w, mean, 2.0, seed) for seed in range(60)]
    assert sizes[:5] == [16] * 4 + [32] and sizes == sorted(sizes)
    assert 180 <= sizes[-1] <= 230 and batch.noise_scale == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize("deviation", [0.0, 1e-9])
def test_without_noise_it_stays(deviation: float) -> None:
    batch, w = controller()
    assert {simulate(batch, w, torch.ones(50, dtype=torch.float64), deviation, seed) for seed in range(5)} == {16}


@pytest.mark.parametrize(("growth", "expected"), [(2.0, [32, 64, 100, 100]), (1.3, [22, 30, 40, 52])])
def test_pure_noise_grows_by_the_bound_up_to_the_limit(growth: float, expected: list[int]) -> None:
    batch, w = controller(growth=growth, limit=101)
    assert [simulate(batch, w, torch.zeros(50, dtype=torch.float64), 1.0, seed) for seed in range(4)] == expected
    assert batch.samples == 16 + sum(expected[:3])


def test_zero_gradients_say_nothing() -> None:
    batch, w = controller()
    assert simulate(batch, w, torch.zeros(50, dtype=torch.float64), 0.0, 0) == 16 and math.isnan(batch.noise_scale)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 200), st.floats(1.01, 8), st.integers(0, 50))
def test_sizes_never_fall_nor_leave_their_grid(micro: int, start: int, room: int, growth: float, seed: int) -> None:
    start = max(start, 2 * micro)
    limit = start + micro + room
    batch, w = controller(3, micro=micro, start=start, limit=limit, growth=growth)
    sizes = [batch.size]
    for step in range(6):
        sizes.append(simulate(batch, w, torch.full((3,), 0.2, dtype=torch.float64), 1.0, seed + step))
        assert batch.accumulation * micro == batch.size
    assert sizes == sorted(sizes) and sizes[-1] <= limit and sizes[0] >= start
    assert all(size % micro == 0 for size in sizes) and batch.samples == sum(sizes[:-1])


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    ends = []
    for factor in (1.0, scale):
        batch, w = controller(beta=0.5, eta=0.7)
        mean = factor * torch.full((50,), 0.2, dtype=torch.float64)
        ends.append([simulate(batch, w, mean, factor, seed) for seed in range(8)])
    assert ends[0] == ends[1] and ends[0][-1] > 16


def test_hooks_see_each_micro_batch_alone() -> None:
    """Against gradients taken one micro-batch at a time, on a model with a tied weight; `.grad` is left alone."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    net[2].weight = net[0].weight
    shared = list(net.parameters())
    x = torch.randn(4, 3, 6, generator=rng(), dtype=torch.float64)
    losses = [net(part).square().mean() for part in x]
    groups = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]) for loss in losses]
    )
    batch = AdaptiveBatch(shared, micro=3, start=12, limit=12, beta=0.0)
    for loss in losses:
        (loss / 4).backward()
    batch.update()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in shared]), groups.mean(0))
    s2, signal = estimates(groups, 3)
    assert batch.noise == pytest.approx(s2, rel=1e-9) and batch.signal == pytest.approx(signal, rel=1e-9)
    batch.remove()
    net(x[0]).sum().backward()
    assert not batch._passes


def test_resume_goes_on_as_if_nothing_had_happened() -> None:
    mean = torch.full((50,), 0.2, dtype=torch.float64)
    whole, w = controller(beta=0.9, every=3)
    expected = [simulate(whole, w, mean, 1.0, seed) for seed in range(30)]
    first, w = controller(beta=0.9, every=3)
    for seed in range(13):
        simulate(first, w, mean, 1.0, seed)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), json.loads(json.dumps(first.state_dict()))):
        second, w = controller(beta=0.9, every=3)
        second.load_state_dict(state)
        assert [simulate(second, w, mean, 1.0, seed) for seed in range(13, 30)] == expected[13:]
        assert second.state_dict() == whole.state_dict()
    other, _ = controller(micro=5)
    other.load_state_dict(state | {"size": 32})
    assert other.size == 35 and other.accumulation == 7
    with pytest.raises(WeftError, match="not the state of an adaptive batch"):
        other.load_state_dict({"size": 32})


def test_a_step_that_is_not_finite_is_counted_and_not_measured() -> None:
    batch, w = controller(beta=0.9)
    mean = torch.full((50,), 0.2, dtype=torch.float64)
    simulate(batch, w, mean, 1.0, 0)
    before = batch.state_dict()
    simulate(batch, w, mean * math.inf, 1.0, 1)
    assert batch.noise == before["noise"] and batch.samples == before["samples"] + before["size"] and batch.steps == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro": 16}, "noise shows between two micro-batches"),
        ({"micro": 10, "start": 15, "limit": 19}, "A batch from 20 to 10 samples cannot be made"),
        ({"start": 64, "limit": 32}, "start is from 1 to limit"),
        ({"micro": 0}, "micro and every are 1 or more"),
        ({"growth": 1.0}, "growth above 1"),
        ({"eta": 0.0}, "eta is above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(WeftError, match=words):
        controller(**options)


def test_wrong_use_is_told() -> None:
    batch, w = controller()
    w.sum().backward()
    with pytest.raises(WeftError, match="after 1 backward passes, and this step has 8"):
        batch.update()
    simulate(batch, w, torch.ones(50, dtype=torch.float64), 1.0, 0)  # what was counted is dropped
    with pytest.raises(WeftError, match="None of the parameters requires a gradient"):
        AdaptiveBatch([torch.zeros(3)], micro=1, start=2, limit=4)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("adaptive")
    together(worker.process, str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize("quiet", ["False", "True"])
def test_two_processes_decide_as_one(ranks: list[dict[str, Any]], quiet: str) -> None:
    alone = worker.train(worker.model())
    assert ranks[0][quiet] == ranks[1][quiet]
    assert alone[-1]["size"] > alone[0]["size"]
    for ours, theirs in zip(alone, ranks[0][quiet], strict=True):
        assert all(ours[name] == pytest.approx(theirs[name], rel=1e-9) for name in ours)
