"""Stopping by a signal: the step under way is finished and kept, then KeyboardInterrupt, whatever the verb.

    with listening():            # the command line around a verb; training in any program
        with finishing():        # from here on a signal waits ...
            for piece in pieces:
                work, keep
                stop_here()      # ... for this place

Ctrl-C (SIGINT), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (SLURM, before the time is up) mean the same.
Outside `finishing`, and when a second one comes, a signal stops at once. What is ignored, as under `nohup`, stays so.
Without `listening` nothing is changed: Ctrl-C is Python's own.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["NAMES", "finishing", "listening", "request", "requested", "stop_here"]

NAMES = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if name in dir(signal))  # Windows has two

_waiting: list[str] = []
"""The name of the signal that has come and waits for `stop_here`."""
_holding: list[bool] = []
"""An entry for each `finishing` under way in the main thread."""


@contextmanager
def listening() -> Iterator[None]:
    """In this block the signals mean: stop. Only the main thread can listen; in another one the block just runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.Signals[name] for name in NAMES]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if before[number] not in (signal.SIG_IGN, None, _come)]
    for number in ours:
        signal.signal(number, _come)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        if ours:
            _waiting.clear()


@contextmanager
def finishing() -> Iterator[None]:
    """In this block a first signal waits for `stop_here`, or for the end of the block.

    Raises KeyboardInterrupt there, which says by which signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _holding.append(True)
    try:
        yield
    finally:
        _holding.pop()
    stop_here()


def stop_here() -> None:
    """What was under way is kept: raise KeyboardInterrupt if a signal waits."""
    if _waiting:
        raise KeyboardInterrupt(_waiting.pop())


def requested() -> bool:
    """Whether a signal waits for the step under way."""
    return bool(_waiting)


def request(name: str = "SIGINT") -> None:
    """As if a signal had come: another process of this run has got one."""
    if not _waiting:
        _waiting.append(name)


def _come(number: int, frame: Any) -> None:
    name = signal.Signals(number).name
    if not _holding or _waiting:
        _waiting.clear()
        raise KeyboardInterrupt(name)
    _waiting.append(name)
    note = f"\nweft: {name}: the step under way is finished and kept; once more stops at once.\n"
    os.write(2, note.encode())  # not print, which the signal may have interrupted
