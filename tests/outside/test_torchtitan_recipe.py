"""The recipe for torchtitan on two processes: shapes, then shards, then numbers, and a checkpoint that is read back."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

import pytest

from tests.processes import launched

RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "torchtitan.py"


def process(rank: int, folder: str) -> None:
    with Path(folder, f"{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(RECIPE), run_name="__main__")


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="gloo")
def test_the_recipe_trains_and_its_loss_falls(tmp_path: Path) -> None:
    launched(process, str(tmp_path))
    (line,) = (line for line in (tmp_path / "0.txt").read_text().splitlines() if line.startswith("loss"))
    losses = [float(loss) for loss in line.split()[1:]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
