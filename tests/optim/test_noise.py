"""Annealed gradient noise: its law, what decides it (seed, step, parameter, position), and resuming."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.noise import add_gradient_noise, noise_deviation

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (7,), ())]


def run(params: list[nn.Parameter], opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for number, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number)).to(p.dtype)
        opt.step()


def noise_of(size: int, step: int, **settings: float) -> Tensor:
    p = nn.Parameter(torch.zeros(size))
    opt = sgd([p])
    add_gradient_noise(opt, **settings)  # type: ignore[arg-type]
    opt.param_groups[0]["noise_step"] = step
    p.grad = torch.zeros(size)
    opt.step()
    return p.grad


@pytest.mark.parametrize("step", [0, 100, 10_000])
def test_variance_and_mean(step: int) -> None:
    noise = noise_of(1_000_000, step, eta=0.3, gamma=0.55).double()
    assert noise.var().item() == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.01)
    assert abs(noise.mean().item()) < 4 * noise_deviation(0.3, 0.55, step) / 1000
    assert (noise.abs() > 3 * noise.std()).double().mean().item() == pytest.approx(0.0027, rel=0.1)


def test_deviations_of_the_card() -> None:
    assert [round(noise_deviation(0.01, 0.55, t), 4) for t in (0, 100, 10**4)] == [0.1, 0.0281, 0.0079]


def test_sgd_walk_has_the_summed_variance() -> None:
    p = nn.Parameter(torch.zeros(100_000))
    opt = torch.optim.SGD([p], lr=0.5)
    add_gradient_noise(opt, eta=1.0)
    for _ in range(10):
        p.grad = torch.zeros_like(p)
        opt.step()
    expected = 0.25 * sum((1 + t) ** -0.55 for t in range(10))
    assert p.detach().var().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_without_variance_the_run_is_the_optimizers_own(make: Make) -> None:
    plain, noisy = parameters(), parameters()
    opt = make(noisy)
    add_gradient_noise(opt, eta=0.0)
    run(plain, make(plain), range(5))
    run(noisy, opt, range(5))
    assert all(torch.equal(a, b) for a, b in zip(plain, noisy, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_resume_is_exact(make: Make, dtype: torch.dtype) -> None:
    whole, stopped = parameters(dtype), parameters(dtype)
    first, second = make(whole), make(stopped)
    for opt in (first, second):
        add_gradient_noise(opt, eta=0.1, scale="relative", seed=3)
    run(whole, first, range(40))
    run(stopped, second, range(20))
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    third = make(stopped)
    add_gradient_noise(third, eta=0.5, seed=4)
    third.load_state_dict(torch.load(file, weights_only=True))
    run(stopped, third, range(20, 40))
    assert all(torch.equal(a, b) for a, b in zip(whole, stopped, strict=True))


def test_steps_and_parameters_have_unrelated_noise_and_the_seed_decides_it() -> None:
    draws = [noise_of(50_000, step) for step in (0, 1, 2)]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.02
    assert torch.equal(noise_of(50_000, 1), draws[1])
    assert not torch.equal(noise_of(50_000, 1, seed=1), draws[1])
    twins = [nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))]
    opt = sgd(twins)
    add_gradient_noise(opt)
    for p in twins:
        p.grad = torch.zeros(50)
    opt.step()
    assert not torch.equal(twins[0], twins[1])


def test_relative_noise_follows_the_gradient() -> None:
    p = nn.Parameter(torch.zeros(200_000))
    opt = sgd([p])
    add_gradient_noise(opt, eta=0.25, scale="relative")
    p.grad = torch.full_like(p, 1e-4)
    opt.step()
    assert (p.grad - 1e-4).std().item() == pytest.approx(0.5e-4, rel=0.02)


def test_spared_frozen_and_gradientless_entries_stay() -> None:
    p, idle = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(3))
    opt = sgd([p, idle])
    add_gradient_noise(opt, spare_zeros=True)
    p.grad = torch.zeros(6, 4)
    p.grad[2] = 1.0
    opt.step()
    assert not p[[0, 1, 3, 4, 5]].any() and (p[2] != -1.0).all()
    assert idle.grad is None and not idle.any()


def test_a_gradient_of_any_layout_gets_the_same_noise() -> None:
    plain, turned = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
    for p, grad in ((plain, torch.zeros(6, 4)), (turned, torch.zeros(4, 6).mT)):
        opt = sgd([p])
        add_gradient_noise(opt)
        p.grad = grad
        opt.step()
    assert torch.equal(plain, turned)


def test_a_closures_gradients_get_the_noise() -> None:
    a, b = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10))
    for p, with_closure in ((a, True), (b, False)):
        opt = sgd([p])
        add_gradient_noise(opt, seed=2)

        def closure(p: nn.Parameter = p, opt: torch.optim.Optimizer = opt) -> Tensor:
            opt.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            if with_closure:
                assert opt.step(closure) is not None
            else:
                closure()
                opt.step()
    assert torch.equal(a, b)


def test_mistakes_are_answered_in_a_sentence() -> None:
    params = parameters()
    opt = sgd(params)
    with pytest.raises(WeftError, match="at least 0"):
        add_gradient_noise(opt, eta=-1.0)
    with pytest.raises(WeftError, match="at least 0"):
        add_gradient_noise(opt, scale="per-layer")  # type: ignore[arg-type]
    add_gradient_noise(opt)
    with pytest.raises(WeftError, match="already adds"):
        add_gradient_noise(opt)
    with pytest.raises(WeftError, match="without gradient noise"):
        opt.load_state_dict(sgd(params).state_dict())
