"""Progress is shown off a terminal too, by one process, and not when quiet."""

from __future__ import annotations

import pytest

from weft import progress
from weft.progress import Bar, loud, say, track


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    yield
    loud("normal")


def test_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "layers", total=3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["layers 1/3", "layers 2/3", "layers 3/3"]
    assert all("left" in line for line in lines[:2])


def test_lines_are_seldom(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 1e6)
    with Bar("train", 100) as bar:
        for _ in range(100):
            bar.update()
        bar.tell("loss 1.5", now=True)
    assert capsys.readouterr().err == "train 100/100, loss 1.5\n"


def test_quiet_says_what_must_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    loud("quiet")
    list(track([1], "layers"))
    say("by the way")
    say("careful", always=True)
    assert capsys.readouterr().err == "careful\n"


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    list(track([1], "layers"))
    say("once", always=True)
    assert capsys.readouterr().err == ""
