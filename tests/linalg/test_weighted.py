"""The loss of an error in the norm of two moments, exact for small layers and estimated for large ones."""

from __future__ import annotations

import pytest
import torch

from weft.linalg.principal import weighted_loss
from weft.linalg.weighted import WeightedLoss


def moments(out: int, inn: int, tokens: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inn, generator=draw, dtype=torch.float64) * torch.logspace(0, -1, inn, dtype=torch.float64)
    g = torch.randn(tokens, out, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, out, dtype=torch.float64)
    return x.mT @ x / tokens, g.mT @ g / tokens


def error(out: int, inn: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, inn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_small_layers_are_exact(shape: tuple[int, int]) -> None:
    C, M = moments(*shape)
    D = error(*shape)
    found = WeightedLoss(C, M, torch.Generator().manual_seed(0))(D)
    assert float(found) == pytest.approx(float(weighted_loss(D, C, M)), rel=1e-5)


@pytest.mark.parametrize("shape", [(90, 24), (24, 90)])
def test_estimates_are_unbiased_and_near(shape: tuple[int, int]) -> None:
    C, M = moments(*shape)
    D, few = error(*shape), 16
    exact = float(weighted_loss(D, C, M))
    found = [float(WeightedLoss(C, M, torch.Generator().manual_seed(i), few)(D)) / exact for i in range(60)]
    spread = torch.tensor(found)
    assert 0.02 < float(spread.std()) < (2 / few) ** 0.5 * 1.5
    assert float(spread.mean()) == pytest.approx(1.0, abs=4 * float(spread.std()) / 60**0.5)


def test_errors_of_one_layer_are_seen_along_the_same_directions() -> None:
    C, M = moments(90, 24)
    D, loss = error(90, 24), WeightedLoss(C, M, torch.Generator().manual_seed(3), 16)
    assert float(loss(2 * D)) == pytest.approx(4 * float(loss(D)), rel=1e-5)
    assert float(loss(torch.zeros(90, 24))) == 0.0


def test_fewer_tokens_than_channels() -> None:
    C, M = moments(90, 24, tokens=20)
    assert torch.isfinite(WeightedLoss(C, M, torch.Generator().manual_seed(0), 16)(error(90, 24)))
