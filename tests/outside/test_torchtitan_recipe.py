"""The recipe for torchtitan on two processes: shapes, then shards, then numbers, and a checkpoint that is read back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "torchtitan.py"


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo")
def test_the_recipe_trains_and_its_loss_falls() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RECIPE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("loss"))
    losses = [float(loss) for loss in line.split()[1:]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
