"""SSO: one call of the oracle a step, gradient descent with one iteration, a loss that never rises within its bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.sso import SSO


class Net(nn.Module):
    """A tanh net of two outputs, in fp64, with dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


X = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(2, (30,), generator=torch.Generator().manual_seed(2))


def loss(z: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z, Y, reduction="sum")


@pytest.mark.parametrize("eta", [0.1, 10.0])
def test_one_iteration_is_gradient_descent_whatever_eta(eta):
    net, plain = Net(), Net()
    optimizer, descent = SSO(net, 1e-2, eta=eta, iterations=1), torch.optim.SGD(plain.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.step(lambda: net(X), loss)
        descent.zero_grad()
        loss(plain(X)).backward()
        descent.step()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)  # the slope is handed on in fp32


def test_it_follows_its_lines():
    net, rate, eta = Net(), 5e-3, 1.5
    plain, optimizer = Net(), SSO(net, rate, eta=eta, iterations=4)
    for _ in range(20):
        optimizer.step(lambda: net(X), loss)
        first = plain(X).detach().requires_grad_(True)
        (G,) = torch.autograd.grad(loss(first), first)
        for _ in range(4):
            z = plain(X)
            surrogate = (G * (z - first.detach())).sum() + (z - first.detach()).square().sum() / (2 * eta)
            grads = torch.autograd.grad(surrogate, list(plain.parameters()))
            with torch.no_grad():
                for p, g in zip(plain.parameters(), grads, strict=True):
                    p -= rate * g
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_the_loss_falls_at_every_step_within_the_bound_and_the_oracle_is_called_once(iterations):
    net, calls, losses = Net(0.5), [], []

    def oracle(z: Tensor) -> Tensor:
        calls.append(z)
        return loss(z)

    optimizer = SSO(net, 2e-3, eta=2.0, iterations=iterations)  # cross-entropy is 1/2-smooth
    for _ in range(20):
        losses.append(float(optimizer.step(lambda: net(X), oracle)))
    assert len(calls) == 20 and net.training and losses == sorted(losses, reverse=True)
    assert all(p.grad is None for p in net.parameters())


def test_more_iterations_go_further_for_one_call():
    ends = []
    for iterations in (1, 20):
        net = Net()
        optimizer = SSO(net, 2e-3, eta=2.0, iterations=iterations)
        ends.append([float(optimizer.step(lambda net=net: net(X), loss)) for _ in range(10)][-1])
    assert ends[1] < ends[0]


def test_an_exact_inner_solve_of_a_linear_model_is_a_newton_step_of_squares():
    """l = |r|^2 / 2 and eta = 1: least squares in one outer step."""
    model, target = nn.Linear(6, 2, bias=False).double(), torch.randn(30, 2, dtype=torch.float64)
    optimizer = SSO(model, 2e-2, eta=1.0, iterations=2000)
    optimizer.step(lambda: model(X), lambda z: (z - target).square().sum() / 2)
    best = torch.linalg.lstsq(X, target).solution.T
    torch.testing.assert_close(model.weight.detach(), best, rtol=1e-4, atol=1e-5)


def test_wrong_options_are_sentences():
    with pytest.raises(WeftError, match="eta is 0 and iterations 5"):
        SSO(Net(), eta=0)
