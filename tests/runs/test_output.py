"""Outputs appear whole or not at all, and unfinished work is gone on with by the same command only."""

from __future__ import annotations

import errno
import importlib
import inspect
import re
import threading
from pathlib import Path

import pytest

from weft.errors import WeftError
from weft.files import replacing, write_text
from weft.runs.output import _PLACES, _await, check_output, open_output

ARGUMENTS = {"model": "pico", "budget": 0.6}


def interrupted(out: Path, step: str | None = "one", error: BaseException | None = None) -> None:
    """A run that finishes one step, writes half of its output and dies."""
    with pytest.raises(BaseException), open_output(out, ARGUMENTS) as work:  # noqa: B017
        if step:
            write_text(work.progress / step, "done")
        (work.path / "model.safetensors").write_text("half")
        raise error or KeyboardInterrupt


def test_complete_output_takes_the_name_and_leaves_nothing_beside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_output(out, ARGUMENTS) as work:
        assert not work.resumed and not out.exists()
        (work.path / "a").mkdir()
        (work.path / "a" / "b").write_text("x")
        write_text(work.progress / "step", "done")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["out", "out/a", "out/a/b"]


def test_an_empty_directory_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open_output(tmp_path / "out", ARGUMENTS) as work:
        (work.path / "f").write_text("x")
    assert (tmp_path / "out" / "f").read_text() == "x"


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
        (out / "precious").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeftError, match=r"The output .*exists and is not .*choose another -o"):
        check_output(out, ARGUMENTS)
    with pytest.raises(WeftError), open_output(out, ARGUMENTS):
        pass
    assert kind != "directory" or (out / "precious").read_text() == "x"
    assert not (tmp_path / "out.partial").exists()


def test_interrupted_work_is_resumed_and_half_written_output_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)
    assert not out.exists()
    check_output(out, ARGUMENTS)
    with open_output(out, ARGUMENTS) as work:
        assert work.resumed and (work.progress / "one").read_text() == "done"
        assert not list(work.path.iterdir())
        (work.path / "f").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_leaves_its_output_behind_and_the_next_clears_it(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    interrupted(tmp_path / "out")
    (partial / "output").mkdir()
    (partial / "output" / "model.safetensors").write_text("half")
    (partial / "progress" / "two.tmp").write_text("half")
    with open_output(tmp_path / "out", ARGUMENTS) as work:
        assert [p.name for p in work.progress.iterdir()] == ["one"] and not list(work.path.iterdir())


def test_another_command_may_not_take_over(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with pytest.raises(
        WeftError, match=r"another command \(budget was 0.6 and is 0.5\).*remove .*out.partial to start over"
    ):
        check_output(tmp_path / "out", {**ARGUMENTS, "budget": 0.5})
    assert (tmp_path / "out.partial" / "progress" / "one").exists()


def test_a_place_may_be_named_in_many_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute, by ./ and ../, with a slash, by ~, by a link, from another directory: the same command."""
    for name in ("model", "texts"):
        (tmp_path / "home" / name).mkdir(parents=True)
    (tmp_path / "texts.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")

    def arguments(model: str, out: str, data: object) -> dict[str, object]:
        return {"model": model, "out": out, "data": data, "tokenizer": "pico", "method": "model", "budget": 0.6}

    first = arguments("model", "out", ["texts", Path("../texts.txt")])
    with pytest.raises(KeyboardInterrupt), open_output("out", first) as work:
        write_text(work.progress / "one", "done")
        raise KeyboardInterrupt
    home = str(tmp_path / "home")
    for where, model, out, data in [
        (home, f"{home}/model", f"{home}/out", [f"{home}/texts/", f"{home}/../texts.txt"]),
        (home, "./model/", "./out/", [f"../{Path(home).name}/texts", tmp_path / "texts.txt"]),
        (home, "~/model", "~/out", ["~/texts", "~/../texts.txt"]),
        (str(tmp_path), "link/model", "link/out", ["link/texts", "texts.txt"]),
    ]:
        monkeypatch.chdir(where)
        check_output(out, arguments(model, out, data))
        with pytest.raises(KeyboardInterrupt), open_output(out, arguments(model, out, data)) as work:
            assert work.resumed
            raise KeyboardInterrupt
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeftError, match=r"another command \(data was"):
        check_output("home/out", arguments("link/model", "home/out", ["link/texts"]))
    with pytest.raises(
        WeftError, match=r"another command .*method was 'model' and is"
    ):  # no place, though one is there
        check_output("home/out", {**arguments("link/model", "home/out", first["data"]), "method": f"{home}/model"})
    assert not (tmp_path / "home" / "~").exists()


def test_every_argument_that_names_a_place_is_known() -> None:
    """What a verb takes as a path, or as a model, is compared as a place."""
    for verb in ("compress", "finetune", "pretrain", "quantize", "merge", "combine"):
        run = importlib.import_module(f"weft.verbs.{verb}").run
        paths = {k for k, p in inspect.signature(run).parameters.items() if re.search("Path", str(p.annotation))}
        models = {"model", "teacher", "tokenizer", "allocate"} & inspect.signature(run).parameters.keys()
        assert (paths | models) - {"out"} <= set(_PLACES), verb


def test_work_with_nothing_finished_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", step=None)
    assert not list(tmp_path.iterdir())


def test_a_stranger_of_that_name_is_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "out.partial"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("x")
    with pytest.raises(WeftError, match="is in the way"):
        check_output(tmp_path / "out", ARGUMENTS)
    with pytest.raises(WeftError), open_output(tmp_path / "out", ARGUMENTS):
        pass
    assert (stranger / "thesis.tex").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_and_keeps_finished_steps_only(tmp_path: Path, error: Exception) -> None:
    out = tmp_path / "out"
    with pytest.raises(WeftError, match=r"disk is full: nothing was written .*same command again"):  # noqa: SIM117
        with open_output(out, ARGUMENTS) as work:
            write_text(work.progress / "one", "done")
            (work.path / "model.safetensors").write_text("half")
            raise error
    assert not out.exists()
    kept = {p.name for p in (tmp_path / "out.partial").rglob("*") if p.is_file()}
    assert kept == {"arguments.json", "one"}


def test_other_processes_of_a_run_neither_clear_nor_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_output(tmp_path / "out", ARGUMENTS) as main:
        (main.path / "f").write_text("x")
        monkeypatch.setenv("RANK", "1")
        with open_output(tmp_path / "out", ARGUMENTS) as other:
            assert other.path == main.path
        assert (main.path / "f").exists() and not (tmp_path / "out").exists()
        monkeypatch.setenv("RANK", "0")
    assert (tmp_path / "out" / "f").exists()


def test_other_processes_wait_until_the_first_has_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would find their files, and take them for the work of an unknown command."""
    monkeypatch.setenv("RANK", "1")
    said, partial = tmp_path / "out.partial" / "arguments.json", tmp_path / "out.partial"

    def first() -> None:
        assert not partial.exists()
        partial.mkdir()
        write_text(said, "{}")

    timer = threading.Timer(0.2, first)
    timer.start()
    with open_output(tmp_path / "out", ARGUMENTS):
        assert said.exists()
    timer.join()
    with pytest.raises(WeftError, match="The first process has not written .*nowhere"):
        _await(tmp_path / "nowhere", 0.05)


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.json"]
