"""`weft scale` on tables, directories, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weft.cli import app
from weft.scaling import LAWS

RUNS = [{"tokens": 10.0**k, "loss": 2 + 50 / 10 ** (0.3 * k)} for k in range(5, 12)]


def weft(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["scale", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in RUNS))
    return path


def test_every_law_has_a_command_that_names_its_quantities() -> None:
    for name, law in LAWS.items():
        code, out, _ = weft(name, "--help")
        assert code == 0 and all(f"--{quantity}" in out for quantity in law.takes)


def test_the_calls_of_the_manual() -> None:
    code, out, _ = weft("step-law", "--parameters", "1B", "--tokens", "20B", "--json")
    assert code == 0 and json.loads(out)["lr"] == pytest.approx(1.013e-3, rel=1e-3)
    code, out, _ = weft("step-law", "--parameters", "70B", "--tokens", "20B")
    assert code == 0 and "0.0000" not in out and "lies outside 2.1e+08 to 1.08e+09" in out


def test_a_fit_of_a_table_of_directories_and_of_perplexities(table: Path, tmp_path: Path) -> None:
    code, out, _ = weft("fit", table, "--draws", 0, "--json")
    found = json.loads(out)
    assert code == 0 and found["floor"] == pytest.approx(2, rel=1e-3) and found["runs"] == 7
    import math

    for i, run in enumerate(RUNS):
        (tmp_path / f"run{i}").mkdir()
        metrics = {"parameters": 5, "tokens": run["tokens"], "perplexity": math.exp(run["loss"])}
        (tmp_path / f"run{i}" / "run.json").write_text(json.dumps({"metrics": metrics}))
    code, out, _ = weft("fit", *(tmp_path / f"run{i}" for i in range(7)), "--draws", 0, "--json")
    assert json.loads(out)["exponents"] == pytest.approx({"tokens": 0.3}, rel=1e-3)
    code, out, _ = weft("fit", table, "--draws", 0)
    assert code == 0 and "exponents tokens" in out


def test_steps_of_one_run_are_named_as_such(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": k, "loss": 2 + 3 / k**0.5}) + "\n" for k in (1, 10, 100, 1000, 9999)))
    code, out, _ = weft("fit", log, "--draws", 0)
    assert code == 0 and "Steps of one run share its schedule" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "nowhere.jsonl"], "no table of runs and no directory nowhere.jsonl"),
        (["fit", "TABLE", "--by", "token"], "A run has no 'token'; the nearest of what it has: tokens"),
        (["fit", "TABLE", "--loss", "los"], "line 1: there is no 'los'"),
        (["fit", "TABLE", "--compute", "1e21"], "A split of compute needs runs of parameters and tokens"),
        (["fit", "TABLE", "--compute", "lots"], "compute must be a positive number"),
        (["fit", "EMPTY"], "There are no runs in what was given"),
        (["fit", "TEXT"], "is no table of runs: give .jsonl"),
        (["fit", "FOLDER"], "is no run that weft wrote"),
        (["step-law", "--tokens", "1B"], "The law 'step-law' needs parameters"),
    ],
)
def test_what_is_wrong_is_a_sentence(arguments: list[str], words: str, table: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("1 2 3")
    places = {"TABLE": table, "EMPTY": tmp_path / "empty.jsonl", "TEXT": tmp_path / "notes.txt", "FOLDER": tmp_path}
    code, out, err = weft(*(places.get(argument, argument) for argument in arguments))
    assert code == 2 and words in " ".join(err.split()) and not out
