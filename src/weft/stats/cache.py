"""Statistics on disk: a key of model, data and needs; snapshots of a pass under way, from which it resumes to the same
bits.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.digests import tensors_digest
from weft.files import replacing
from weft.signals import finishing, requested, stop_here
from weft.tensors import plain_values, read_metadata, read_tensors

__all__ = ["Snapshots", "accumulate", "fingerprint"]

T = TypeVar("T")

_SECONDS = 30.0  # between snapshots: an interruption costs at most this much work


def fingerprint(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], needs: Iterable[str], layers: Iterable[str]
) -> str:
    """A key of everything the statistics depend on: the model's code, settings and weights, the data, what is asked."""
    config = getattr(model, "config", None)
    settings = "" if config is None else config.to_json_string()
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings, sorted(needs), list(layers)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensors_digest([plain_values(tensor)])}".encode())
    for batch in batches:
        digest.update(f"{sorted(batch)}{tensors_digest([batch[key] for key in sorted(batch)])}".encode())
    return digest.hexdigest()[:24]


class Snapshots:
    """What a pass under way has summed so far, renamed into `path` (a stem) when whole: every half minute, and at the
    end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".safetensors")
        self._written = time.monotonic()

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sums and the words about them in the last snapshot; nothing without a readable one."""
        try:
            return read_tensors(self.path), json.loads(read_metadata(self.path)["state"])
        except (FileNotFoundError, SafetensorError):
            return {}, {}

    def after_batch(self, sums: Mapping[str, Tensor], words: Mapping[str, Any], *, last: bool) -> None:
        """Write a snapshot when it is time, and after the last batch that will be seen."""
        if last or time.monotonic() - self._written > _SECONDS:
            self._write(sums, words)
            self._written = time.monotonic()

    def _write(self, sums: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in sums.items()}
        with replacing(self.path) as beside:
            save_file(tensors, beside, metadata={"state": json.dumps(words)})


def accumulate(items: Sequence[T], add: Callable[[T], None], sums: dict[str, Tensor], path: Path | None = None) -> None:
    """Call `add` on every item in order, which adds to `sums`; with a path, an interrupted call goes on from there to
    the same bits, on the items that it has not seen.
    """
    snapshots = None if path is None else Snapshots(path)
    kept, words = ({}, {}) if snapshots is None else snapshots.restore()
    sums |= kept
    start = int(words.get("items", 0))
    with nullcontext() if snapshots is None else finishing():
        for i, item in enumerate(items[start:], start + 1):
            add(item)
            if snapshots is not None:
                snapshots.after_batch(sums, {"items": i}, last=requested() or i == len(items))
            stop_here()
