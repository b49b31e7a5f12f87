"""Signals: SIGINT, SIGTERM, SIGHUP and SIGUSR1 mean one thing in every verb, and what is under way is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from weft.cli import app
from weft.signals import NAMES, finishing, listening, request, requested, stop_here


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """A shell's background ignores SIGINT, and the rest would end the tests."""
    numbers = [signal.Signals[name] for name in NAMES]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda *_: pytest.fail("nobody listens"))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(name: str) -> None:
    signal.raise_signal(signal.Signals[name])


@pytest.mark.parametrize("name", NAMES)
def test_outside_a_piece_a_signal_stops_at_once(name: str) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt, match=name), listening():
        done.append("before")
        send(name)
        done.append("after")
    assert done == ["before"]


@pytest.mark.parametrize("name", NAMES)
def test_a_piece_under_way_is_finished(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    kept = []
    with pytest.raises(KeyboardInterrupt, match=name), listening():
        for piece in range(4):
            with finishing():
                if piece == 1:
                    send(name)
                    assert requested()
                kept.append(piece)
    assert kept == [0, 1] and not requested()
    assert f"{name}: the step under way is finished" in capfd.readouterr().err


def test_a_place_to_stop_inside_a_long_piece() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), listening(), finishing():
        send("SIGTERM")
        done.append("first")
        stop_here()
        done.append("second")
    assert done == ["first"]


def test_the_second_signal_stops_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), listening(), finishing():
        send("SIGTERM")
        done.append("first")
        send("SIGINT")
        done.append("second")
    assert done == ["first"] and not requested()


def test_a_mistake_inside_a_piece_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ValueError, match="wrong"), listening(), finishing():
        send("SIGTERM")
        raise ValueError("wrong")
    assert not requested()


def test_another_process_can_ask() -> None:
    with pytest.raises(KeyboardInterrupt), listening(), finishing():
        request()


def test_handlers_are_given_back_and_what_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    before = [signal.getsignal(signal.Signals[name]) for name in NAMES]
    with listening(), listening():
        send("SIGHUP")
        with finishing():
            send("SIGHUP")
    assert [signal.getsignal(signal.Signals[name]) for name in NAMES] == before


def test_other_threads_just_run() -> None:
    done = []

    def work() -> None:
        with listening(), finishing():
            done.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]


CALLS = {
    "inspect": ["inspect", "pico"],
    "select": ["select", "d.jsonl", "-o", "k.jsonl"],
    "plan": ["plan", "pico", "--memory", "8GB"],
    "compress": ["compress", "pico", "-o", "out"],
    "finetune": ["finetune", "pico", "-o", "out"],
    "evaluate": ["eval", "pico"],
    "merge": ["merge", "pico", "-o", "out"],
    "combine": ["combine", "a", "b", "-o", "out"],
    "quantize": ["quantize", "pico", "-o", "out"],
    "export": ["export", "pico", "-o", "out"],
    "pretrain": ["pretrain", "-o", "out"],
    "demo": ["demo"],
}


def test_every_verb_that_works_is_here() -> None:
    verbs = {command.name for command in app.registered_commands}
    assert {arguments[0] for arguments in CALLS.values()} == verbs - {"methods"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("verb", CALLS)
def test_every_verb_says_so_in_one_sentence(
    verb: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(**arguments: Any) -> None:
        send(name)
        pytest.fail("went on")

    monkeypatch.setattr(__import__(f"weft.verbs.{verb}", fromlist=["run"]), "run", run)
    answer = CliRunner().invoke(app, CALLS[verb])
    assert answer.exit_code == 130, answer.output
    by = "" if name == "SIGINT" else f" by {name}"
    resumes = verb in ("compress", "quantize", "finetune", "pretrain", "demo", "select")
    way_on = "the same command goes on from the last finished step" if resumes else "nothing was written"
    assert answer.stderr == f"weft: Interrupted{by}; {way_on}.\n" and answer.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["quantize", "merge"])
def test_nothing_half_written_is_left(
    verb: str, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, module = tiny_directory, __import__(f"weft.verbs.{verb}", fromlist=["save_model"])
    if verb == "merge":
        source = tmp_path / "codes"
        assert CliRunner().invoke(app, ["quantize", str(tiny_directory), "-o", str(source)]).exit_code == 0

    def save_model(model: Any, tokenizer: Any, path: Path, **more: Any) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        send("SIGTERM")

    monkeypatch.setattr(module, "save_model", save_model)
    answer = CliRunner().invoke(app, [verb, str(source), "-o", str(tmp_path / "out")])
    way_on = "nothing was written" if verb == "merge" else "the same command goes on from the last finished step"
    assert answer.exit_code == 130 and f"Interrupted by SIGTERM; {way_on}." in answer.stderr
    assert not list(tmp_path.glob("out*"))
