"""The default text: the Python standard library's own sources, which are real and on every machine; and, to calibrate
models of prose too, its documentation in turn with them ("mixed").

A file is held out when the SHA-1 of its path relative to the standard library, read as an integer, is a multiple of
16. That is the rule the embedded model was trained under, so the evaluation text is text that it has not seen, and
calibration never reads it.
Tests, IDLE and installed packages belong to neither side: they are absent from many installations.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from weft.errors import WeftError

__all__ = ["Split", "calibration_files", "default_text", "evaluation_files", "is_held_out"]

Split = Literal["calibration", "evaluation", "mixed"]
_LEFT_OUT = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})


def is_held_out(relative: str) -> bool:
    """Whether the file at this path (relative to the standard library, with forward slashes) belongs to the
    evaluation text.
    """
    return int(hashlib.sha1(relative.encode()).hexdigest(), 16) % 16 == 0


def calibration_files(root: Path | None = None) -> list[Path]:
    """The files to calibrate and train on, in the order of their relative paths.

    Args:
        root: the standard library; None for the running interpreter's.
    """
    return _files(root, held_out=False)


def evaluation_files(root: Path | None = None) -> list[Path]:
    """The held-out files, in the order of their relative paths; see `calibration_files`."""
    return _files(root, held_out=True)


def default_text(split: Split, root: Path | None = None) -> str:
    """All files of one split, joined by a line break; "mixed" is the calibration split in turn with as much prose,
    chapters of the Python reference, where this Python carries it.

    Raises:
        WeftError: this Python carries no readable standard library (an embedded or frozen interpreter).
    """
    files = evaluation_files(root) if split == "evaluation" else calibration_files(root)
    texts = map(_read, files)
    return "\n".join(_in_turn(_chapters(), texts) if split == "mixed" else texts)


def _chapters() -> list[str]:
    """The chapters of the Python reference that `help()` shows: English prose with examples."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a Python without its documentation
        return []
    return [topics[name] for name in sorted(topics)]


def _in_turn(chapters: list[str], texts: Iterator[str]) -> Iterator[str]:
    """Each chapter, and behind it texts of at least its length; all texts where there are no chapters."""
    for chapter in chapters:
        yield chapter
        owed = len(chapter)
        while owed > 0 and (text := next(texts, "")):
            yield text[: max(owed, 2000)]
            owed -= len(text)
    if not chapters:
        yield from texts


def _files(root: Path | None, held_out: bool) -> list[Path]:
    root = root or Path(sysconfig.get_path("stdlib"))
    wanted = [r for r in sorted(_sources(root)) if is_held_out(r) == held_out]
    # _sysconfigdata_*: a build's own settings, different on every machine
    files = [root / r for r in wanted if not r.startswith("_sysconfigdata")]
    if not files:
        raise WeftError(f"There are no Python sources under {root} to use as default text; name a text file yourself.")
    return files


def _sources(root: Path) -> Iterator[str]:
    """The paths of the sources, relative to the root; what is left out is not walked through."""
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        yield from (Path(place, name).relative_to(root).as_posix() for name in files if name.endswith(".py"))


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # honours the file's own encoding declaration
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8", errors="ignore")
