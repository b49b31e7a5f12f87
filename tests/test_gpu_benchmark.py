"""The command for a GPU, on tiny shapes on a CPU: every step ends, every figure is on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, str(Path(__file__).parent.parent / "benchmarks" / "gpu.py"), "--dry-run"]


def run(out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run([*COMMAND, "--out", str(out), *options], capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_every_check_runs(tmp_path: Path) -> None:
    status, rows = run(tmp_path)
    assert status == 0, [row for row in rows if row.get("status") == "failed"]
    ended = [row["step"] for row in rows if row.get("status") == "done"]
    assert ended == ["kernels", "optimizer steps", "LoRA step", "factorisation", "layers", "training", "methods"]
    assert {row["step"] for row in rows if row.get("status") == "measured"} == set(ended)
    for row in rows:  # peers and weft in one row, a step of each in turn, and cold refreshes beside cold ones
        if row.get("status") == "measured" and row.get("item") == "weft galore and galore-torch":
            kinds = [{key for key in row[name] if key.startswith("refresh")} for name in row["item"].split(" and ")]
            assert kinds == [{"refresh_cold_ms"}, {"refresh_cold_ms"}]


def test_time_that_ends_is_said(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--minutes", "0")
    assert status == 0 and {row["status"] for row in rows[1:]} == {"out of time"}
