"""`run.json`: what a run did, beside what it made: versions, device, arguments, seed, times and metrics."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import weft
from weft.files import jsonable, write_json

__all__ = ["Run", "begin"]

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


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
        """Write the record atomically and return it.

        Args:
            output: a directory, which gets `run.json`; or a file such as report.html, which gets report.run.json
                beside it.
        """
        self.metrics = jsonable(dict(metrics))
        record = {**asdict(self), "finished": _now()}
        path = output / "run.json" if output.is_dir() else output.with_suffix(".run.json")
        write_json(path, record)
        return record


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
