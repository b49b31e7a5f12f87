"""The table finds what a binary search among the edges finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels import normal_float
from weft.kernels.cells import bucketize, cells
from weft.optim import inner


def midpoints(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


CODES = {
    "dynamic": midpoints(inner._dynamic_code(True, torch.device("cpu"))),
    "dynamic unsigned": inner._dynamic_code(False, torch.device("cpu"))[:-1],
    **{f"normal float {bits}": midpoints(normal_float.levels(bits)) for bits in (2, 3, 4, 8)},
}


def agrees(unit: Tensor, edges: Tensor) -> bool:
    return torch.equal(bucketize(unit, cells(edges)), torch.bucketize(unit, edges).to(torch.uint8))


@pytest.mark.parametrize("edges", CODES.values(), ids=CODES)
def test_codes_in_use(edges: Tensor) -> None:
    """At, just above and just below every edge too."""
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** (-9 * torch.rand(50_000, generator=generator)) * torch.rand(50_000, generator=generator)
    beside = [torch.nextafter(edges, torch.full_like(edges, side)) for side in (-2.0, 2.0)]
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 2.0**-24])
    assert agrees(torch.cat([spread, -spread, edges, *beside, special]).clamp(-1, 1), edges)


@settings(deadline=None)
@given(st.lists(st.integers(-200, 200), unique=True, max_size=100), st.lists(st.floats(-1, 1, width=32), min_size=1))
def test_any_edges_that_lie_apart(numbers: list[int], unit: list[float]) -> None:
    edges = torch.tensor(sorted(numbers)).double().div(200).float()
    assert agrees(torch.cat([torch.tensor(unit), edges]), edges)


def test_edges_too_close_are_refused() -> None:
    with pytest.raises(ValueError, match="one cell"):
        cells(torch.tensor([0.5, 0.5001]))
