"""Writing a file as a whole or not at all, and turning values into what JSON holds."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["METRICS_FILE", "digest", "jsonable", "replacing", "write_json", "write_text"]

METRICS_FILE = "metrics.jsonl"
"""What training logs, beside its output."""
WHOLE, BLOCKS, BLOCK = 2**26, 2**10, 2**16


def digest(path: Path) -> str:
    """A digest of a file's bytes: of all where it has at most 64 MiB, else of its length and 1,024 blocks at even
    distances, which other weights or other data do not share.
    """
    status = path.stat()
    return _digest(os.fspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)  # a run asks more than once
def _digest(path: str, size: int, changed: int) -> str:
    found = hashlib.blake2b(str(size).encode(), digest_size=12)
    with open(path, "rb") as file:
        if size <= WHOLE:
            found.update(file.read())
        else:
            for i in range(BLOCKS):
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well and disappears when it does
    not.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:  # on the disk before it bears the name, or a power cut leaves an empty file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `jsonable(value)` as a whole or not at all."""
    write_text(path, json.dumps(jsonable(value), indent=2) + "\n")


def jsonable(value: Any) -> Any:
    """`value` with paths, devices and dtypes as strings, tensors as lists, and NaN and infinities, which JSON
    lacks, as None.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
