"""What a long job says on stderr while it runs: a bar with the time left on a terminal, and a plain line now and then
elsewhere, in a log file or a notebook.

    loud("quiet")      nothing but sentences that must be read       loud("normal")
    loud("verbose")    also what transformers and torch have to say

Only the process of rank 0 says anything.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

from tqdm import tqdm

__all__ = ["Bar", "first_process", "loud", "say", "track", "tune_libraries"]

T = TypeVar("T")
Volume = Literal["quiet", "normal", "verbose"]

SECONDS = 10.0
"""Between two plain lines."""
_volume: Volume = "normal"


def loud(volume: Volume) -> None:
    """How much to say from now on."""
    global _volume
    _volume = volume


def tune_libraries() -> None:
    """Have transformers say as much: its bars on a terminal alone, its messages when verbose."""
    if "transformers" in sys.modules:
        import logging as levels

        from transformers import logging

        if _volume == "quiet" or not sys.stderr.isatty():
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if _volume != "normal":
            logging.set_verbosity(levels.INFO if _volume == "verbose" else levels.ERROR)


def say(sentence: str, *, always: bool = False) -> None:
    """One line on stderr.

    Args:
        always: also when quiet: a warning.
    """
    if first_process() and (always or _volume != "quiet"):
        tqdm.write(sentence, file=sys.stderr)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """`items`, with their progress on stderr while they are consumed.

    Args:
        what: what is being done, a word or two.
        total: how many items there are, where `items` has no length.
    """
    with Bar(what, total if total is not None else _length(items)) as bar:
        for item in items:
            yield item
            bar.update()


class Bar:
    """The progress of one job; a context manager.

    Args:
        what: what is being done.
        total: of how many steps; None where nobody knows.
        done: steps that an earlier run has done.
        leave: whether the bar stays when the job is done.
        lines: whether plain lines are wanted where there is no terminal.
    """

    def __init__(
        self, what: str, total: int | None = None, done: int = 0, *, leave: bool = True, lines: bool = True
    ) -> None:
        self.what, self.total, self.done, self.note = what, total, done, ""
        self.began, self.said = time.monotonic(), time.monotonic()
        self.start = done
        shown = first_process() and _volume != "quiet"
        terminal = shown and sys.stderr.isatty()
        self.lines = shown and lines and not terminal
        self.bar = tqdm(
            total=total, initial=done, desc=what, file=sys.stderr, disable=not terminal, dynamic_ncols=True, leave=leave
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self) -> None:
        """One step more."""
        self.done += 1
        self.bar.update()
        self.tell()

    def tell(self, note: str | None = None, *, soon: bool = False, now: bool = False) -> None:
        """Show where the job is.

        Args:
            note: figures to show beside it from now on.
            soon: with a plain line a second after the last one; now: at once.
        """
        if note is not None:
            self.note = note
            self.bar.set_postfix_str(note, refresh=False)
        wait = 0.0 if now else 1.0 if soon else SECONDS
        if self.lines and time.monotonic() - self.said >= wait:
            self.said = time.monotonic()
            say(self._line())

    def close(self) -> None:
        """The job is over."""
        self.bar.close()

    def _line(self) -> str:
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        passed, made = time.monotonic() - self.began, self.done - self.start
        left = None if self.total is None or not made else passed / made * (self.total - self.done)
        words = [f"{self.what} {count}", self.note, "" if not left else f"{tqdm.format_interval(left)} left"]
        return ", ".join(word for word in words if word)


def first_process() -> bool:
    """Whether this is the process of rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _length(items: Iterable[object]) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
