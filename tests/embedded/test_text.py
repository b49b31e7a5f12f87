"""The default text: never overlapping, deterministic, and the rule that the embedded model was trained under."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import pytest

from weft.embedded.text import calibration_files, default_text, evaluation_files, is_held_out
from weft.errors import WeftError

STDLIB = Path(sysconfig.get_path("stdlib"))


def relatives(files: list[Path]) -> list[str]:
    return [file.relative_to(STDLIB).as_posix() for file in files]


def test_splits_do_not_overlap_and_follow_the_rule() -> None:
    held_out, rest = set(relatives(evaluation_files())), set(relatives(calibration_files()))
    assert not held_out & rest
    assert len(held_out) > 20 and len(rest) > 10 * len(held_out)
    for name in held_out | rest:
        digest = int.from_bytes(hashlib.sha1(name.encode()).digest(), "big")
        assert (digest % 16 == 0) == (name in held_out)


def test_order_is_that_of_the_paths() -> None:
    assert relatives(calibration_files()) == sorted(relatives(calibration_files()))
    assert relatives(evaluation_files()) == sorted(relatives(evaluation_files()))


def test_what_belongs_to_neither_side() -> None:
    names = relatives(calibration_files() + evaluation_files())
    assert "argparse.py" in names
    assert not [n for n in names if {"test", "tests", "idlelib", "site-packages"} & set(n.split("/"))]


def test_text_is_the_files_joined(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    texts = {f"m{i}.py": f"x = {i}\n" for i in range(40)} | {"test/a.py": "never\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    both = [default_text(split, tmp_path).split("\n\n") for split in ("calibration", "evaluation")]
    assert sorted(line.strip() for part in both for line in part) == sorted(t.strip() for t in texts.values())[1:]
    assert all(is_held_out(f"m{line.split()[-1]}.py") for line in both[1])
    assert "never" not in both[0] + both[1]


def test_declared_encodings_are_honoured_and_broken_ones_survived(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# \xe9\n".encode("latin-1"))
    (tmp_path / "wrong.py").write_bytes(b"# \xff\xfe after\n")
    text = default_text("calibration", tmp_path) + default_text_or_empty(tmp_path)
    assert "é" in text and "after" in text


def default_text_or_empty(root: Path) -> str:
    try:
        return default_text("evaluation", root)
    except WeftError:
        return ""


def test_no_sources_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="no Python sources under .* name a text file"):
        default_text("evaluation", tmp_path)


def test_the_mixed_text_is_half_prose_from_beginning_to_end() -> None:
    """A window is drawn from each part of the text: each part must hold both kinds, and nothing of the held out."""
    from pydoc_data.topics import topics

    text, code = default_text("mixed"), default_text("calibration")
    prose = [chapter for chapter in topics.values() if len(chapter) > 500]
    assert all(chapter in text for chapter in prose)
    quarters = [text[i * len(text) // 4 : (i + 1) * len(text) // 4] for i in range(4)]
    for quarter in quarters:
        share = sum(len(chapter) for chapter in prose if chapter[:200] in quarter) / len(quarter)
        assert 0.3 < share < 0.7 and sum(line in code for line in quarter.splitlines() if "def " in line) > 20
    assert not any(
        line in text for file in evaluation_files()[:9] for line in file.read_text().splitlines() if len(line) > 95
    )
