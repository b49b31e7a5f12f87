"""What is said where no text is given: nothing to who stays with the embedded model, whatever verbs it went through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.runs.calibration import say_default


def made_of(directory: Path, model: str) -> str:
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"arguments": {"model": model}}))
    return str(directory)


def test_what_was_made_of_the_embedded_model_needs_no_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressed = made_of(tmp_path / "compressed", "pico")
    say_default(made_of(tmp_path / "recovered", compressed), "training", "sources", "--data")
    assert not capsys.readouterr().err
    stranger = made_of(tmp_path / "stranger", str(tmp_path / "elsewhere"))
    loop = made_of(tmp_path / "loop", str(tmp_path / "loop"))
    for model in (stranger, loop, "someone/model"):
        say_default(model, "training", "sources", "--data")
        assert "No --data was given" in capsys.readouterr().err
