"""Where a verb writes: beside the output until all of it is there, so that nothing half-written ever bears the
output's name.

    OUT.partial/arguments.json   the fingerprint of the command whose work this is
    OUT.partial/inputs.json      what lay in the files that it read (`weft.runs.inputs`)
    OUT.partial/progress/        finished steps, kept when the run is interrupted: the same command goes on from them
    OUT.partial/output/          the output itself, renamed to OUT when complete, thrown away on an interrupt

Only the process of rank 0 checks, clears and renames; the others of a multi-process run share its directories.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import WeftError
from weft.files import METRICS_FILE, jsonable, write_json
from weft.runs.inputs import Contents, changes

__all__ = ["Workplace", "check_output", "keep_logs", "open_output"]

_FILES = ("arguments.json", "inputs.json")
_NAMED = 4
"""Differing arguments that an error lists."""
_PLACES = (
    *("model", "teacher", "tokenizer", "adapter", "adapters", "allocate"),
    *("calibration", "data", "text", "eval_text", "eval_data", "report"),
)
"""Arguments that name files and directories; the output itself is where the work lies, and is not compared."""


@dataclass(frozen=True)
class Workplace:
    """The directories of one run under way."""

    path: Path
    """Write the output here."""
    progress: Path
    """Write finished steps here, each through `replacing`; removed when the output is complete."""
    resumed: bool
    """Whether an interrupted run of the same command left finished steps."""


def check_output(out: str | os.PathLike[str], arguments: Mapping[str, Any], inputs: Contents | None = None) -> None:
    """Refuse what `open_output` would refuse, without touching the disk: call this before a model is loaded.

    Raises:
        WeftError: `out` exists and is not an empty directory, or beside it lies the unfinished work of a command with
            other arguments, or of this one on files that have changed since.
    """
    out = Path(out).expanduser()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise WeftError(f"The output {out} exists and is not a directory; choose another -o.")
    if out.is_dir() and any(out.iterdir()):
        raise WeftError(f"The output directory {out} exists and is not empty; choose another -o, or remove it first.")
    _check_partial(_partial(out), _decisive(arguments), inputs or {})


@contextmanager
def open_output(
    out: str | os.PathLike[str], arguments: Mapping[str, Any], inputs: Contents | None = None
) -> Iterator[Workplace]:
    """A place to work in, whose `path` becomes `out` when the block ends well.

    Args:
        arguments: everything that decides what is written; a run resumes only the work of equal ones.
        inputs: `weft.runs.inputs.contents` of the files that it reads, which must be the same too.

    Raises:
        WeftError: see `check_output`; or the disk ran full, and then nothing but finished steps is kept.
    """
    out = Path(out).expanduser()
    partial, main = _partial(out), int(os.environ.get("RANK", "0")) == 0
    progress, output = partial / "progress", partial / "output"
    if main:
        check_output(out, arguments, inputs)
    try:
        if main:
            _clear(partial)
            partial.mkdir(parents=True, exist_ok=True)
            write_json(partial / "arguments.json", _decisive(arguments))
            if inputs:
                write_json(partial / "inputs.json", inputs)
        elif os.environ.get("GROUP_RANK", "0") == "0":  # on the first machine: another may have a disk of its own
            _await(partial / "arguments.json")
        resumed = _has_steps(partial)
        for directory in (progress, output):
            directory.mkdir(parents=True, exist_ok=True)
        yield Workplace(output, progress, resumed)
        if main:
            _publish(partial, out)
    except BaseException as error:
        if main:
            _clear(partial)
            if not _has_steps(partial):
                shutil.rmtree(partial, ignore_errors=True)
        if _is_full(error):
            raise WeftError(
                f"The disk is full: nothing was written to {out}. Free some space and run the same command again; "
                "it goes on from the last finished step."
            ) from error
        raise


def _await(path: Path, seconds: float = 600.0) -> None:
    """Until the first process, which checks that nobody else's work is there, has said that it is ours."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise WeftError(f"The first process has not written {path}; see what it says.")
        time.sleep(0.02)


def _decisive(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they are compared: a place by its real path, from wherever and however it was named."""
    return {
        key: _place(value) if key in _PLACES else value for key, value in jsonable(arguments).items() if key != "out"
    }


def _place(value: Any) -> Any:
    if isinstance(value, list):
        return [_place(item) for item in value]
    if not isinstance(value, str) or not os.path.exists(os.path.expanduser(value)):
        return value  # a Hub id, the name of an embedded model, of an allocation
    return os.path.realpath(os.path.expanduser(value))


def keep_logs(place: Workplace) -> None:
    """Put what training logged beside the output: metrics.jsonl, and TensorBoard's runs where there are some."""
    shutil.copy(place.progress / METRICS_FILE, place.path / METRICS_FILE)
    if (place.progress / "runs").is_dir():
        shutil.copytree(place.progress / "runs", place.path / "runs")


def _partial(out: Path) -> Path:
    absolute = Path(os.path.abspath(out))
    return absolute.with_name(absolute.name + ".partial")


def _has_steps(partial: Path) -> bool:
    progress = partial / "progress"
    return progress.is_dir() and any(progress.iterdir())


def _check_partial(partial: Path, arguments: dict[str, Any], inputs: Contents) -> None:
    way_out = f"choose another -o, or remove {partial} to start over"
    if not partial.exists():
        return
    ours = {*_FILES, *(f"{name}.tmp" for name in _FILES), "progress", "output"}
    if not partial.is_dir() or {path.name for path in partial.iterdir()} - ours:
        raise WeftError(f"{partial} is in the way: it is not the work of an interrupted run of weft; {way_out}.")
    if not _has_steps(partial):
        return
    try:
        theirs = json.loads((partial / "arguments.json").read_text(encoding="utf-8"))
        read = json.loads(_text(partial / "inputs.json") or "{}")
    except (OSError, ValueError):
        raise WeftError(f"{partial} does not say which command's unfinished work it holds; {way_out}.") from None
    theirs = _decisive(theirs)
    changed = sorted(k for k in theirs.keys() | arguments.keys() if theirs.get(k) != arguments.get(k))
    if changed:
        what = ", ".join(f"{k} was {theirs.get(k)!r} and is {arguments.get(k)!r}" for k in changed[:_NAMED])
        what += f", and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise WeftError(
            f"{partial} holds the unfinished work of another command ({what}); repeat it to finish, {way_out}."
        )
    replaced = changes(read, inputs)
    if replaced:
        raise WeftError(
            f"{partial} holds the unfinished work of this command on other files: since then, {', '.join(replaced)} "
            f"changed; bring back what was there to finish, {way_out}."
        )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _clear(partial: Path) -> None:
    """Remove what is not a finished step."""
    shutil.rmtree(partial / "output", ignore_errors=True)
    for leftover in [*partial.glob("*.tmp"), *partial.glob("progress/*.tmp")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _publish(partial: Path, out: Path) -> None:
    if out.is_dir():
        out.rmdir()  # empty, or `check_output` had refused it
    os.replace(partial / "output", out)
    shutil.rmtree(partial)


def _is_full(error: BaseException) -> bool:
    """Whether the disk was full; safetensors and torch wrap the system's error in their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = str(error)
    return isinstance(error, Exception) and ("StorageFull" in words or os.strerror(errno.ENOSPC) in words)
