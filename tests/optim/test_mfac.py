"""M-FAC against dense solves with its Fisher matrix, and what its window keeps over a checkpoint."""

from __future__ import annotations

import copy
import importlib
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft.optim as wo
from weft.errors import WeftError

module = importlib.import_module("weft.optim.mfac")  # as an attribute it is the function
SHAPES = [(5, 4), (7,), (2, 3, 2)]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(p.dtype)


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in tensors])


def dense_mfac(w: Tensor, gradients: list[Tensor], lr: float, m: int, damping: float, beta: float, wd: float) -> Tensor:
    """Frantar et al. 2021 with F as a matrix, and the divisor min(k, m)."""
    window: list[Tensor] = []
    w, v = w.clone(), torch.zeros_like(w)
    for gradient in gradients:
        g = gradient + wd * w
        window = [*window, g][-m:]
        F = damping * torch.eye(len(w), dtype=w.dtype) + sum(torch.outer(x, x) for x in window) / len(window)
        v = beta * v + (1 - beta) * torch.linalg.solve(F, g)
        w -= lr * v
    return w


@pytest.mark.parametrize("block", ["group", "parameter"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_it_is_the_dense_algorithm(block: Any, momentum: float, weight_decay: float) -> None:
    params, m, steps = parameters(), 4, 11
    start, gradients = [p.detach().clone() for p in params], []
    optimizer = wo.mfac(
        params, 0.1, gradients=m, damping=1e-2, momentum=momentum, weight_decay=weight_decay, block=block
    )
    for step in range(steps):
        set_gradients(params, step)
        gradients.append([p.grad.clone() for p in params])
        optimizer.step()
    pieces = [[i] for i in range(len(params))] if block == "parameter" else [range(len(params))]
    for piece in pieces:
        expected = dense_mfac(
            flat([start[i] for i in piece]), [flat([g[i] for i in piece]) for g in gradients], 0.1, m, 1e-2, momentum,
            weight_decay,
        )  # fmt: skip
        torch.testing.assert_close(flat([params[i] for i in piece]), expected, rtol=1e-9, atol=1e-9)


def test_the_first_step_and_a_window_of_equal_gradients() -> None:
    """u = g / (lam + ||g||^2), for the first gradient and for any number of the same one."""
    params = parameters()
    optimizer = wo.mfac(params, 1.0, gradients=3, damping=1e-3)
    for _ in range(5):
        before = flat(params)
        set_gradients(params, 0)
        optimizer.step()
        g = flat([p.grad for p in params])
        torch.testing.assert_close(before - flat(params), g / (1e-3 + g @ g), rtol=1e-11, atol=1e-13)


def test_every_step_is_a_direction_of_descent() -> None:
    params = parameters(torch.float32)
    optimizer = wo.mfac(params, 1e-3, gradients=4, damping=1e-7)
    for step in range(12):
        before = flat(params)
        set_gradients(params, step % 5, scale=10.0 ** (step % 3))
        optimizer.step()
        assert (before - flat(params)) @ flat([p.grad for p in params]) > 0


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e12])
def test_gradients_of_any_size_leave_finite_weights(scale: float) -> None:
    params = parameters(torch.float32)
    optimizer = wo.mfac(params, 1e-3, gradients=4, damping=1e-12)
    for _ in range(6):
        set_gradients(params, 0, scale)
        optimizer.step()
    assert flat(params).isfinite().all()


def test_a_parameter_without_a_gradient_has_a_zero_in_the_window() -> None:
    """It does not move, and the others do as if its gradient had been 0."""
    ends = []
    for zeros in (False, True):
        params = parameters()
        optimizer = wo.mfac(params, 0.1, gradients=3, damping=1e-2)
        for step in range(7):
            set_gradients(params, step)
            if step in (0, 3, 4):
                params[1].grad = torch.zeros_like(params[1]) if zeros else None
            before = params[1].detach().clone()
            optimizer.step()
            assert zeros or torch.equal(before, params[1]) == (step in (0, 3, 4))
        ends.append(optimizer.state[params[0]]["gram"])
    torch.testing.assert_close(*ends)
    frozen = parameters()
    frozen[0].requires_grad_(False)
    optimizer = wo.mfac(frozen, 0.1, gradients=3)
    frozen[1].grad = torch.ones_like(frozen[1])
    optimizer.step()
    assert "window" not in optimizer.state[frozen[0]] and torch.equal(frozen[0], parameters()[0])


def test_groups_have_windows_of_their_own() -> None:
    together, apart = parameters(), parameters()
    one = wo.mfac([{"params": together[:2], "lr": 0.3}, {"params": together[2:], "gradients": 2}], 0.1, gradients=4)
    others = [wo.mfac(apart[:2], 0.3, gradients=4), wo.mfac(apart[2:], 0.1, gradients=2)]
    for step in range(6):
        set_gradients(together, step)
        set_gradients(apart, step)
        for optimizer in (one, *others):
            optimizer.step()
    assert torch.equal(flat(together), flat(apart))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_for_bit(dtype: torch.dtype, momentum: float) -> None:
    def make(params: list[nn.Parameter]) -> wo.MFAC:
        return wo.mfac(params, 0.1, gradients=4, momentum=momentum, weight_decay=0.01, state_dtype=torch.bfloat16)

    through, halfway = parameters(dtype), parameters(dtype)
    whole, first = make(through), make(halfway)
    for step in range(14):
        set_gradients(through, step)
        whole.step()
    for step in range(7):
        set_gradients(halfway, step)
        first.step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed = copy.deepcopy(halfway)
    second = make(resumed)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(7, 14):
        set_gradients(resumed, step)
        second.step()
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(through, resumed, strict=True))
    assert second.state[resumed[1]]["window"].dtype == torch.bfloat16
    assert whole.state_bytes() == second.state_bytes() == second.planned_bytes() > 0


@pytest.mark.parametrize("block", ["group", "parameter"])
def test_bytes_are_those_of_the_window(block: Any) -> None:
    params = parameters(torch.float32)
    entries, blocks = sum(p.numel() for p in params), 1 if block == "group" else len(params)
    optimizer = wo.mfac(params, gradients=6, momentum=0.5, block=block)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.state_bytes() == optimizer.planned_bytes() == 4 * 7 * entries + 8 * 36 * blocks


def test_it_learns_what_plain_gradients_learn_slowly() -> None:
    """Least squares of condition number 10^4: from the same start, far below gradient descent at its best rate."""
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, 10, dtype=torch.float64)
    X = torch.randn(400, 10, generator=g, dtype=torch.float64) * scale
    target = X @ (1 / scale)
    losses = {}
    for name in ("sgd", "mfac"):
        w = nn.Parameter(torch.zeros(10, dtype=torch.float64))
        limit = 1 / float(torch.linalg.eigvalsh(X.mT @ X / 400).max())
        optimizer: Any = torch.optim.SGD([w], limit) if name == "sgd" else wo.mfac([w], 0.2, gradients=32, damping=1e-8)
        for step in range(150):
            rows = torch.randint(0, 400, (40,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (X[rows] @ w - target[rows]).square().mean().div(2).backward()
            optimizer.step()
        losses[name] = float((X @ w.detach() - target).square().mean())
    assert losses["mfac"] < 0.2 * losses["sgd"], losses


def test_a_model_gives_its_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = wo.mfac(model, gradients=2)
    assert [p for p in optimizer.param_groups[0]["params"]] == list(model[1].parameters())
    assert optimizer.param_groups[0]["gradients"] == 2
    model.requires_grad_(False)
    with pytest.raises(WeftError, match="nothing to train"):
        wo.mfac(model)


def test_a_closure_is_evaluated_with_gradients() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = wo.mfac([w], 0.1, gradients=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and closure().item() < 3.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradients": 0}, "1 gradient or more"),
        ({"damping": 0.0}, "damping above 0"),
        ({"momentum": 1.0}, "momentum from 0"),
        ({"block": "layer"}, "block of the Fisher matrix called 'layer'"),
        ({"state_dtype": torch.int8}, "floating-point"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(WeftError, match=words):
        wo.mfac(parameters(), **options)


def test_bad_gradients_and_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = wo.mfac(params, 0.1, gradients=3)
    set_gradients(params, 0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_memory", lambda device: 900)
        with pytest.raises(WeftError, match=r"3 gradients of 39 weights takes .* keep fewer gradients"):
            optimizer.step()
    optimizer.step()
    before, state = flat(params), copy.deepcopy(optimizer.state_dict())
    params[1].grad[2] = torch.nan
    with pytest.raises(WeftError, match="not finite"):
        optimizer.step()
    assert torch.equal(before, flat(params))
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    with pytest.raises(WeftError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(params).state_dict())


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DTensor", nn.Parameter)
    with pytest.raises(WeftError, match="sharded parameters"):
        wo.mfac(parameters())
