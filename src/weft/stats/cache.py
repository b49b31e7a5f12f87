"""Statistics on disk: a key of model, data and needs; snapshots of a pass under way, from which it resumes to the same
bits.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.files import replacing
from weft.stats.collect import Collector
from weft.tensors import read_metadata, read_tensors

__all__ = ["Snapshots", "fingerprint"]

_SECONDS = 30.0  # between snapshots: an interruption costs at most this much work


def fingerprint(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], needs: Iterable[str], layers: Iterable[str]
) -> str:
    """A key of everything the statistics depend on: the model's code, settings and weights, the data, what is asked."""
    config = getattr(model, "config", None)
    settings = "" if config is None else config.to_json_string()
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings, sorted(needs), list(layers)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_sums(tensor)}".encode())
    for i, batch in enumerate(batches):
        for key, tensor in sorted(batch.items()):
            digest.update(f"{i}{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def _sums(tensor: Tensor) -> list[float]:
    """Of values, squares and values by position: a weight's fingerprint without moving it off its device."""
    flat = tensor.flatten().double()
    places = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
    return torch.stack([flat.sum(), flat.square().sum(), flat @ places]).tolist()


class Snapshots:
    """The state of one `Collector`, renamed into `path` (a stem) when whole: every half minute, and at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".safetensors")
        self._written = time.monotonic()

    def restore(self, collector: Collector) -> int:
        """Fill the collector from the last snapshot; the number of batches it has seen, 0 without a readable one."""
        try:
            state, sums = json.loads(read_metadata(self.path)["state"]), read_tensors(self.path)
        except (FileNotFoundError, SafetensorError):
            return 0
        for key, total in sums.items():
            name, need = key.rsplit(":", 1)
            collector.sums[name][need] = total.to(_device(collector, name))
        collector.tokens.update(state["tokens"])
        collector.leader.update(state["leader"])
        collector.sequences = state["sequences"]
        return int(state["batches"])

    def after_batch(self, collector: Collector, done: int, *, last: bool) -> None:
        """Write a snapshot when it is time, and after the last batch that will be seen."""
        if last or time.monotonic() - self._written > _SECONDS:
            self._write(collector, done)
            self._written = time.monotonic()

    def _write(self, collector: Collector, done: int) -> None:
        state = {
            "batches": done,
            "sequences": collector.sequences,
            "tokens": dict(collector.tokens),
            "leader": collector.leader,
        }
        tensors = {f"{name}:{need}": t.cpu() for name, sums in collector.sums.items() for need, t in sums.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as beside:
            save_file(tensors, beside, metadata={"state": json.dumps(state)})


def _device(collector: Collector, name: str) -> torch.device:
    return next(collector.layers[name].parameters()).device
