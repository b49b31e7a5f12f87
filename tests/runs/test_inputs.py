"""Unfinished work is gone on with on the very files that it began with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from weft import files
from weft.errors import WeftError
from weft.files import digest, write_text
from weft.runs.inputs import changes, contents
from weft.runs.output import check_output, open_output


def test_a_file_counts_by_its_bytes_and_not_by_its_date(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("one")
    before = digest(path)
    shutil.copy(path, copy)
    os.utime(copy, (1, 1))
    assert digest(copy) == before
    path.write_text("two")
    os.utime(path, (2, 2))
    assert digest(path) != before


def test_large_files_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE", 100)
    monkeypatch.setattr(files, "BLOCKS", 5)
    monkeypatch.setattr(files, "BLOCK", 10)
    found = set()
    for i, text in enumerate([b"a" * 1000, b"a" * 999 + b"b", b"b" + b"a" * 999, b"a" * 1001]):
        (tmp_path / f"{i}").write_bytes(text)
        found.add(digest(tmp_path / f"{i}"))
    assert len(found) == 4


def test_what_changed_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("[]")
    (tmp_path / "x").mkdir()
    data = [tmp_path / "train.jsonl", tmp_path / "x" / "train.jsonl"]
    for path in data:
        path.write_text('{"text": "a"}\n')
    before = contents(model=model, data=data, eval_text=None, tokenizer="some/hub-id")
    assert set(before) == {"model", "data"} and len(before["data"]) == 2
    assert changes(before, contents(model=model, data=data)) == []
    (model / "tokenizer.json").write_text("[1]")
    data[1].write_text('{"text": "b"}\n')
    now = contents(model=model, data=data)
    assert changes(before, now) == [f"data ({data[1]})", "model (tokenizer.json)"]


def test_of_each_file_it_is_asked_a_few_times_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for each other file: the default text has hundreds."""
    texts = [tmp_path / f"{i}.txt" for i in range(60)]
    for path in texts:
        path.write_text(path.name)
    asked: list[Path] = []
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: asked.append(path) or is_dir(path))
    assert len(contents(text=texts)["text"]) == 60
    assert len(asked) <= 5 * 60


def test_the_same_command_on_a_changed_file_is_refused(tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "train.jsonl"
    data.write_text('{"text": "a"}\n')
    with pytest.raises(KeyboardInterrupt), open_output(out, {}, contents(data=data)) as work:
        write_text(work.progress / "one", "done")
        raise KeyboardInterrupt
    check_output(out, {}, contents(data=data))
    data.write_text('{"text": "b"}\n')
    with pytest.raises(WeftError, match=r"on other files: since then, data \(train.jsonl\) changed; bring back"):
        check_output(out, {}, contents(data=data))
    data.write_text('{"text": "a"}\n')
    with open_output(out, {}, contents(data=data)) as work:
        assert work.resumed


def test_files_have_one_name_however_their_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two directories that hold files of the same names, by absolute path, from within, and by ~."""
    for place in ("one", "two"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep" / "a.txt").write_text(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    expected = contents(data=[str(tmp_path / "one"), str(tmp_path / "two")])
    assert len(expected["data"]) == 2
    assert contents(data=["one", "./two/"]) == contents(data=["~/one", "~/two"]) == expected
