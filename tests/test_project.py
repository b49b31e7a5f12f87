"""The project's own files agree with one another and say nothing about the machine they were written on."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import weft

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_one_version() -> None:
    assert PROJECT["version"] == weft.__version__


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    groups = [
        PROJECT["dependencies"],
        PROJECT["optional-dependencies"]["test"],
        PROJECT["optional-dependencies"]["data"],
        PROJECT["optional-dependencies"]["integrations"],
    ]
    for requirement in map(Requirement, itertools.chain(*groups)):
        assert requirement.name in pins(), requirement
        assert requirement.specifier.contains(pins()[requirement.name]), requirement


def test_the_oldest_transformers_that_is_tried_is_the_oldest_that_is_allowed() -> None:
    lines = (ROOT / "oldest.txt").read_text().splitlines()
    oldest = next(line for line in lines if line.startswith("transformers=="))
    allowed = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "transformers")
    least = next(part.version for part in allowed.specifier if part.operator == ">=")
    assert Version(least) == Version(oldest.removeprefix("transformers=="))


def test_every_python_that_is_allowed_is_named() -> None:
    """And the code is written in the syntax of the oldest."""
    prefix = "Programming Language :: Python :: 3."
    named = [int(one.removeprefix(prefix)) for one in PROJECT["classifiers"] if one.startswith(prefix)]
    oldest = Version(PROJECT["requires-python"].removeprefix(">="))
    assert named == list(range(oldest.minor, 15)) and "Typing :: Typed" in PROJECT["classifiers"]
    assert (
        f"py3{oldest.minor}" == tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"]
    )


def test_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0" and "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_wheel_holds_all_that_weft_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the package, the line for Python's start, valid metadata; and it runs from there."""
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(tmp_path / "site")
        inside = set(wheel.namelist())
    sources = {str(file.relative_to(ROOT / "src")) for file in tracked() if file.is_relative_to(ROOT / "src")}
    assert sources <= inside and {"_weft_startup.py", "weft_startup.pth"} <= inside
    code = "import weft.embedded as e; print(e.__file__, (e.model_path('pico') / 'model.safetensors').stat().st_size)"
    there = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=there, cwd=tmp_path, capture_output=True, text=True)
    place, size = done.stdout.split()
    assert place.startswith(str(tmp_path)) and int(size) > 1_000_000, done.stderr


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["sh", "-n", ROOT / script], check=True)


def test_run_explains_itself() -> None:
    helped = subprocess.run([ROOT / "run", "help"], capture_output=True, text=True, check=True)
    assert "./run demo" in helped.stdout and "./run test" in helped.stdout
    refused = subprocess.run([ROOT / "run", "tset"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "./run test" in refused.stderr


def test_an_old_python_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """With no Python that is new enough on the path, `run` says so and makes nothing."""
    for name in ("sh", "dirname", "sed", "cat", "date"):
        found = next(p for d in [*os.defpath.split(":"), "/usr/bin", "/bin"] if (p := Path(d or ".") / name).exists())
        (tmp_path / name).symlink_to(found)
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("run", "pyproject.toml", "constraints.txt"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "run").chmod(0o755)
    done = subprocess.run(
        ["sh", copy / "run", "demo"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Python 3.11 or later is needed" in done.stderr
    assert not (copy / ".venv").exists()


def test_no_word_of_a_machine() -> None:
    """Paths of one machine, conflict marks, and secrets have no place in the repository."""
    machine = re.compile(
        "|".join(
            ["/wor" + "k/", "/ho" + "me/", "/ro" + "ot/", "/tm" + "p/env", "<<<<" + "<<<", "BEGIN .*PRIVATE " + "KEY"]
        )
    )
    wrong = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png") or path.name == "tokenizer.json":
            continue
        wrong += [
            f"{path}: {line.strip()[:80]}"
            for line in path.read_text(errors="ignore").splitlines()
            if machine.search(line)
        ]
    assert not wrong, "\n".join(wrong)


def test_nothing_large_but_the_embedded_model() -> None:
    large = {str(p.relative_to(ROOT)) for p in tracked() if p.stat().st_size > 1_000_000}
    assert large <= {"src/weft/embedded/pico/model.safetensors"}
