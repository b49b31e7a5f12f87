"""Measures against loops, planted structure, and laws that they must obey."""

from __future__ import annotations

import math

import pytest
import torch

from weft.linalg.power_law import tail_exponent
from weft.measures import MEASURES
from weft.measures.farms import windows
from weft.measures.intruder_dimensions import similarities


def gaussian(out: int, inn: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(name: str, *matrices: torch.Tensor, **options: object) -> dict[str, float]:
    return dict(MEASURES[name].value(*matrices, **{**MEASURES[name].defaults, **options}))


def slowly(x: list[float], starts: list[int]) -> float:
    """Hill's estimate at the start of the least Kolmogorov-Smirnov distance, in loops."""
    found = []
    for i in starts:
        tail = x[i:]
        alpha = 1 + len(tail) / sum(math.log(v / x[i]) for v in tail)
        gap = max(abs(j / len(tail) - 1 + (v / x[i]) ** (1 - alpha)) for j, v in enumerate(tail))
        found.append((gap, alpha))
    return min(found)[1]


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_an_exact_power_law_comes_back(alpha: float) -> None:
    uniform = (torch.arange(1, 10_001, dtype=torch.float64) - 0.5) / 10_000
    x = uniform ** (-1 / (alpha - 1))
    assert tail_exponent(x, "middle") == pytest.approx(alpha, rel=0.01)
    assert tail_exponent(x, "any") == pytest.approx(alpha, rel=0.03)


def test_starts_of_the_tail_are_those_of_a_slow_loop() -> None:
    values = gaussian(40, 60).svd()[1].square()
    x = sorted(values.tolist())
    assert tail_exponent(values, "any") == pytest.approx(slowly(x, list(range(len(x) - 1))), rel=1e-9)
    assert tail_exponent(values, "middle") == pytest.approx(slowly(x, [len(x) // 2]), rel=1e-9)
    tens = [math.log10(v) for v in x]
    width = (tens[-1] - tens[0]) / 100
    bins = [min(int((t - tens[0]) / width), 99) for t in tens]
    edge = 10 ** (tens[0] + width * max(range(100), key=bins.count))
    near = [i for i in range(len(x) - 1) if 0.95 * edge <= x[i] <= 1.5 * edge]
    assert tail_exponent(values, "peak") == pytest.approx(slowly(x, near), rel=1e-9)


def test_too_little_to_fit_is_no_number() -> None:
    assert all(math.isnan(tail_exponent(torch.tensor(x))) for x in ([], [1.0], [2.0, 2.0, 2.0], [0.0, 0.0]))
    with pytest.raises(ValueError, match="not at 'end'"):
        tail_exponent(torch.ones(3), "end")


def test_farms_does_not_depend_on_the_shape_of_noise() -> None:
    """Figures of the whole matrix and of windows: the card's own check on i.i.d. Gaussians."""
    wide = {n: value("farms", gaussian(256, n), block=128, count=4, start="middle")["alpha"] for n in (256, 1024)}
    assert wide[256] == pytest.approx(2.12, abs=0.05) and wide[1024] == pytest.approx(2.12, abs=0.05)
    whole = {n: tail_exponent(gaussian(256, n).svd()[1].square(), "middle") for n in (256, 1024)}
    assert whole[256] == pytest.approx(2.1, abs=0.1) and whole[1024] == pytest.approx(3.5, abs=0.15)


def test_farms_is_free_of_scale_and_of_the_side() -> None:
    W = gaussian(48, 80)
    own = value("farms", W, block=32, count=3)["alpha"]
    assert value("farms", 1e-3 * W, block=32, count=3)["alpha"] == pytest.approx(own, rel=1e-9)
    assert value("farms", W.mT, block=32, count=3)["alpha"] == pytest.approx(own, rel=1e-9)
    square = gaussian(40, 40)
    whole = tail_exponent(square.svd()[1].square(), "peak")
    assert value("farms", square)["alpha"] == pytest.approx(whole, rel=1e-6)


def test_windows_have_one_shape_and_the_published_steps() -> None:
    W = torch.arange(50 * 70).view(50, 70)
    parts = windows(W, 20, 1.5, 4)
    assert len(parts) == 16 and {tuple(part.shape) for part in parts} == {(20, 30)}
    assert [int(part[0, 0]) for part in parts[:4]] == [0, 13, 26, 39], "steps of (70 - 30) // 3"
    assert [int(part[0, 0]) // 70 for part in parts[::4]] == [0, 10, 20, 30]
    assert {tuple(part.shape) for part in windows(W, 60, 2.0, 3)} == {(35, 70)}, "both sides shrink"
    assert len(windows(W, 50, 1.0, 1)) == 1
    assert value("farms", torch.outer(torch.ones(8), torch.ones(8)).double())["alpha"] != 0


def test_intruders_are_those_that_were_planted() -> None:
    W0 = gaussian(64, 64) / 8
    u, v = (torch.nn.functional.normalize(gaussian(64, 1, seed), dim=0) for seed in (1, 2))
    counts = [value("intruder-dimensions", W0 + size * u @ v.mT, W0)["intruders"] for size in (0.0, 0.5, 3.0, 6.0)]
    assert counts == [0, 0, 1, 1]
    same = similarities(1.7 * W0, W0)
    assert same[0].min() > 1 - 1e-6 and same[1] == pytest.approx(1)
    planted = W0 + 3 * u @ v.mT
    by_epsilon = [value("intruder-dimensions", planted, W0, epsilon=e)["intruders"] for e in (0.1, 0.4, 0.7, 1.0)]
    assert by_epsilon == sorted(by_epsilon)
    R = torch.linalg.qr(gaussian(64, 64, 3))[0]
    assert value("intruder-dimensions", R @ planted, R @ W0) == pytest.approx(
        value("intruder-dimensions", planted, W0), abs=1e-9
    )


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
def test_similarities_are_those_of_whole_decompositions(shape: tuple[int, int]) -> None:
    W0, W = gaussian(*shape), gaussian(*shape, 5)
    U0, U = (torch.linalg.svd(x, full_matrices=False)[0] for x in (W0, W))
    expected = (U0.mT @ U[:, :4]).abs()
    found, kept = similarities(W, W0, 4)
    torch.testing.assert_close(found, expected.amax(0), rtol=1e-6, atol=1e-8)
    assert kept == pytest.approx(float(expected[:8].square().sum() / 4), rel=1e-6)


def test_drift_is_the_change() -> None:
    W0 = gaussian(20, 30)
    change = 0.1 * gaussian(20, 1, 1) @ gaussian(1, 30, 2)
    found = value("drift", W0 + change, W0)
    assert found["drift"] == pytest.approx(float(change.norm() / W0.norm()), rel=1e-6)
    assert found["drift_rank"] == pytest.approx(1, rel=1e-6)
    assert value("drift", W0, W0) == {"drift": 0.0, "drift_rank": 0.0}


def test_a_figure_is_one_measure_s() -> None:
    """Its name is its column."""
    for side in ("reads", "reads_model"):
        names = [figure for measure in MEASURES.values() for figure in getattr(measure, side)]
        assert len(names) == len(set(names))
