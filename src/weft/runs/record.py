"""`run.json`: what a run did, beside what it made: versions, device, arguments, seed, times and metrics."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import weft
from weft.files import jsonable, write_json
from weft.progress import say

__all__ = ["Result", "Run", "begin"]

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


NOTABLE = 0.1
"""The share of an update that may be lost to rounding without a word."""


@dataclass
class Run:
    """One run from its start on; `write` completes it."""

    command: str
    arguments: dict[str, Any]
    seed: int | None
    device: str | None
    started: str
    versions: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)

    def write(self, output: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record atomically and return it; say what in the metrics asks for a decision.

        Args:
            output: a directory, which gets `run.json`; or a file such as report.html, which gets report.run.json
                beside it.
        """
        self.metrics = jsonable(dict(metrics))
        for sentence in _advice(metrics):
            say(sentence, always=True)
        record = {**asdict(self), "finished": _now()}
        path = output / "run.json" if output.is_dir() else output.with_suffix(".run.json")
        write_json(path, record)
        return record


class Result(dict[str, Any]):
    """What a verb returns: a dictionary that shows itself as a person reads it, one figure a line."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{key:<{width}}  {_shown(value)}" for key, value in self.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def _advice(metrics: Mapping[str, Any]) -> Iterator[str]:
    before, after, lost = (metrics.get(key) or 0 for key in ("bytes_before", "bytes", "update_lost"))
    if before and after > before:
        yield f"The output is larger than the input: {after / 1e6:,.1f} MB against {before / 1e6:,.1f} MB."
    if lost > NOTABLE:
        yield (
            f"Rounding to the model's dtype loses {lost:.0%} of the adapter's update: write the merged model with "
            "--dtype float32, or keep the adapter apart."
        )


def begin(
    command: str, arguments: Mapping[str, Any], *, seed: int | None = None, device: torch.device | str | None = None
) -> Run:
    """Start the clock of a run.

    Args:
        command: the verb, e.g. "compress".
        arguments: what the verb was called with, defaults included.
    """
    return Run(
        command=command,
        arguments=jsonable(dict(arguments)),
        seed=seed,
        device=None if device is None else describe_device(torch.device(device)),
        started=_now(),
        versions={
            "weft": weft.__version__,
            "python": platform.python_version(),
            **_versions(),
            "platform": sys.platform,
        },
    )


def describe_device(device: torch.device) -> str:
    """ "cpu", or the accelerator's index and name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
