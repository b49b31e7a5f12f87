"""The demonstration on a tiny model and a small library: every stage, its page, and what a second run does."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from weft.errors import WeftError
from weft.verbs import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, result) of one demonstration."""
    library = tmp_path_factory.mktemp("library")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py")):
        shutil.copy(path, library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.embedded.text.sysconfig.get_path", lambda _: str(library))
        patch.setattr(demo, "MODEL", str(tiny_directory))
        patch.setattr(demo, "COMPRESS", {**demo.COMPRESS, "windows": 4, "window": 64})
        patch.setattr(demo, "FINETUNE", {**demo.FINETUNE, "steps": 2, "window": 64, "batch": 2, "warmup": 0})
        patch.setattr(demo, "EVALUATE", {"window": 64, "windows": 4})
        patch.setattr(demo, "BUDGETS", (0.8, 0.5))
        patch.setattr(demo, "CURVE_WINDOWS", 2)
        out = tmp_path_factory.mktemp("work") / "demo"
        yield out, demo.run(out, device="cpu")


def test_the_table_is_measured(made: Any) -> None:
    _, result = made
    stages = {stage["name"]: stage for stage in result["stages"]}
    assert list(stages) == ["dense", "compressed", "recovered"]
    assert stages["compressed"]["parameters"] == stages["recovered"]["parameters"] < stages["dense"]["parameters"]
    assert stages["compressed"]["perplexity"] != stages["recovered"]["perplexity"], "training changed something"


def test_curves_start_at_the_dense_model(made: Any) -> None:
    curves = made[1]["curves"]
    assert set(curves) == set(demo.CURVES)
    assert len({points["1.0"] for points in curves.values()}) == 1
    assert all(list(points) == ["1.0", "0.8", "0.5"] for points in curves.values())


def test_a_new_process_continued_the_prompt(made: Any) -> None:
    assert made[1]["generated"].startswith(demo.PROMPT.split("\n")[0])


def test_everything_is_written_and_nothing_left_over(made: Any) -> None:
    out, result = made
    assert {p.name for p in out.iterdir()} == {"compressed", "recovered", "report.html", "run.json"}
    assert json.loads((out / "run.json").read_text())["metrics"] == result
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 9 and "kfac-svd, best" in page and "http" not in page


def test_a_second_run_keeps_what_is_finished(
    made: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = made
    monkeypatch.setattr(demo, "BUDGETS", ())  # curves and the new process are never kept, and cost the most
    monkeypatch.setattr(demo, "_reload", lambda _: result["generated"])
    before = (out / "compressed" / "run.json").stat().st_mtime_ns
    again = demo.run(out, device="cpu")
    assert (out / "compressed" / "run.json").stat().st_mtime_ns == before
    assert [s["perplexity"] for s in again["stages"]] == [s["perplexity"] for s in result["stages"]]
    said = capsys.readouterr().err
    assert said.count("kept from an earlier run") == 2
    assert "take about a minute on this machine" in said.split("2/6")[0]
    with pytest.raises(WeftError, match="made with another seed"):
        demo.run(out, seed=1, device="cpu")


def test_a_strangers_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(WeftError, match=r"holds thesis.tex, which no demonstration made"):
        demo.run(tmp_path)
