"""The command for a GPU, on tiny shapes on a CPU: every step ends, every figure is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.processes import script

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def run(out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    status = script(out, GPU, "--dry-run", "--out", str(out), *options).wait()
    return status, [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_every_check_runs(tmp_path: Path) -> None:
    status, rows = run(tmp_path)
    assert status == 0, [row for row in rows if row.get("status") == "failed"]
    ended = [row["step"] for row in rows if row.get("status") == "done"]
    steps = ["kernels", "optimizer steps", "LoRA step", "factorisation", "layers", "training", "structures", "methods"]
    assert ended == steps
    assert {row["step"] for row in rows if row.get("status") == "measured"} == set(ended)
    for row in rows:  # peers and weft in one row, a step of each in turn, and cold refreshes beside cold ones
        if row.get("status") == "measured" and row.get("item") == "weft galore and galore-torch":
            kinds = [{key for key in row[name] if key.startswith("refresh")} for name in row["item"].split(" and ")]
            assert kinds == [{"refresh_cold_ms"}, {"refresh_cold_ms"}]


def test_time_that_ends_is_said(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--minutes", "0")
    assert status == 0 and {row["status"] for row in rows[1:]} == {"out of time"}
