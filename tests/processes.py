"""Processes of a test's own, for what one process cannot show: gloo, signals, a command that ends.

They are forked from a server that has imported what all of them need, which takes ten times what most of them do. Where
the imports are what is tested, a test starts a Python of its own instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import ProcessExitedException

__all__ = ["Started", "command", "context", "launched", "script", "start", "together"]

PRELOADED = ["torch.distributed.fsdp", "transformers.trainer", "weft.cli", "weft.verbs.compress", "weft.verbs.pretrain"]
METHOD = "spawn" if sys.platform == "win32" else "forkserver"


def context() -> Any:
    """The multiprocessing context; the environment of its processes is that of the first call."""
    found = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        found.set_forkserver_preload(PRELOADED)
    return found


def together(worker: Callable[..., None], *arguments: Any, world: int = 2) -> None:
    """worker(rank, *arguments) in `world` processes at once; an exception in one of them ends all, and is raised. Where
    one died of a signal, what it said last is raised with it.
    """
    context()
    with tempfile.TemporaryDirectory() as folder:
        told = (folder, worker, arguments)
        try:
            torch.multiprocessing.start_processes(_listened, told, world, start_method=METHOD)
        except ProcessExitedException as error:
            said = "; ".join(f"{path.stem}: {path.read_text()[-600:]}" for path in sorted(Path(folder).iterdir()))
            raise AssertionError(f"{error}; stderr of {said}") from error


def _listened(rank: int, folder: str, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _to_file(2, os.path.join(folder, f"process {rank}.txt"))
    worker(rank, *arguments)


def launched(worker: Callable[..., None], *arguments: Any, world: int = 2) -> None:
    """The same, each process with the environment that torchrun would give it, on a CPU."""
    # held here: a port that is found free and let go may be another's before the first process takes it
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    together(_ranked, world, store.port, worker, arguments, world=world)


def _ranked(rank: int, world: int, port: int, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    torch.set_num_threads(1)
    worker(rank, *arguments)


@dataclass
class Started:
    """A process whose output goes to files."""

    process: BaseProcess
    out: Path
    err: Path

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """Send it a signal, where it still runs."""
        if self.process.pid is not None and self.running():
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """Its exit code, a signal that ended it as a negative number."""
        self.process.join(seconds)
        if self.running():
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.err.read_text()[-2000:]}")
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def stderr(self) -> str:
        """What it has written to stderr."""
        return self.err.read_text()


def start(folder: Path, target: Callable[..., None], *arguments: Any) -> Started:
    """target(*arguments) in a process that SIGINT interrupts; `folder` takes its output."""
    number = len(list(folder.glob("*.stderr")))
    out, err = folder / f"{number}.stdout", folder / f"{number}.stderr"
    process = context().Process(target=_redirected, args=(str(out), str(err), target, arguments))
    process.start()
    return Started(process, out, err)


def command(folder: Path, words: Sequence[str]) -> Started:
    """`weft` with these words."""
    return start(folder, weft, words)


def script(folder: Path, path: Path, *words: str) -> Started:
    """`python path` with these words."""
    return start(folder, _script, str(path), words)


def _script(path: str, words: Sequence[str]) -> None:
    sys.argv = [path, *words]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def weft(words: Sequence[str]) -> None:
    """The command, as its entry point runs it."""
    from weft.cli import main

    sys.argv = ["weft", *words]
    main()


def _redirected(out: str, err: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _to_file(1, out)
    _to_file(2, err)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
    target(*arguments)


def _to_file(number: int, file: str) -> None:
    """What this process writes to the descriptor goes there."""
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(opened, number)
    os.close(opened)
