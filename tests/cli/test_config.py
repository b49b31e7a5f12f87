"""--config: the arguments of a verb from a file, and those of a finished run from its run.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from weft.cli import answer, app, evaluate


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the verb would be called with."""
    arguments: dict[str, Any] = {}

    def work(verb: str, **given: Any) -> dict[str, Any]:
        arguments.update(given, verb=verb)
        return {}

    for module in (answer, evaluate):
        monkeypatch.setattr(module, "work", work)
    return arguments


def weft(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_file_gives_arguments_and_the_command_line_goes_before(tmp_path: Path, called: dict[str, Any]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: pico\nout: smaller\nmethod: svd-llm\nby-block: true\nlayers: '*mlp*'\nridge: 0.5\nseed: 3\n"
    )
    weft("compress", "--config", file)
    assert called["model"] == "pico" and called["method"] == "svd-llm" and called["by_block"] is True
    assert called["layers"] == ["*mlp*"] and called["ridge"] == 0.5 and called["seed"] == 3
    weft("compress", "--config", file, "--method", "svd", "other-model")
    assert (called["model"], called["method"], called["out"]) == ("other-model", "svd", Path("smaller"))


def test_a_finished_run_is_a_file_of_arguments(tmp_path: Path, called: dict[str, Any]) -> None:
    record = {"command": "compress", "versions": {}, "seed": 1}
    arguments = {"model": "pico", "out": "smaller", "budget": 0.5, "layers": None, "round": 8, "ridge": 1e-3}
    (tmp_path / "run.json").write_text(json.dumps({**record, "arguments": arguments}))
    weft("compress", "--config", tmp_path / "run.json", "-o", "again")
    assert (called["budget"], called["round"], called["ridge"]) == ("0.5", 8, 1e-3)
    assert called["out"] == Path("again") and called["layers"] is None
    refused = CliRunner().invoke(app, ["eval", "--config", str(tmp_path / "run.json")])
    assert refused.exit_code == 2 and "is the record of weft compress, not of weft eval" in refused.output


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: pico\nwindw: 3\n", "weft eval takes no 'windw'; the nearest are: window"),
        ("just words", "holds no arguments: write one NAME: VALUE a line"),
        ("a: [1", "is neither YAML nor JSON"),
        (None, "cannot be read"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, called: dict[str, Any], text: str | None, sentence: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    refused = CliRunner().invoke(app, ["eval", "--config", str(file)])
    assert refused.exit_code == 2 and sentence in " ".join(refused.output.split()) and not called


def test_every_verb_takes_it() -> None:
    import typer

    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    commands |= {f"scale {name}": command for name, command in commands.pop("scale").commands.items()}
    for name, command in commands.items():
        assert {"config", "quiet", "verbose"} <= {p.name for p in command.params}, name


def test_several_processes_answer_once(monkeypatch: pytest.MonkeyPatch, called: dict[str, Any]) -> None:
    assert json.loads(weft("eval", "pico", "--json")) == {}
    monkeypatch.setenv("RANK", "1")
    assert weft("eval", "pico", "--json") == "" and weft("eval", "pico") == ""


def test_names_of_methods_are_completed() -> None:
    from weft.cli.options import method_names

    assert set(method_names("compress")("svd")) >= {"svd", "svd-llm"}
    assert "lora" in method_names()("lo") and not method_names("compress")("lora")
