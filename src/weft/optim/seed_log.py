"""The log of a zeroth-order run: seeds and scalars, from which the trained weights can be computed again.

A step of `ZerothOrder` is decided by the seed of its directions, which follows from the run's seed and the step's
number, and by one number a direction (half the difference of its two losses). With the learning rate and the
perturbation that is 4 q + 8 G bytes a step for q directions and G parameter groups: 20,000 steps of MeZO are 240 kB,
whatever the model's size.
Source: MeZO (Malladi et al., 2023, arXiv 2305.17333), section 2.1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from weft.errors import WeftError
from weft.files import replacing
from weft.tensors import read_metadata, read_tensors

__all__ = ["SeedLog"]

_FORMAT = "weft-seed-log-1"


@dataclass(frozen=True)
class SeedLog:
    """One run.

    config: the run's seed, estimator, inner rule and chunk, and each parameter's name, shape, dtype and kind of device;
    JSON-able.
    """

    config: dict[str, Any]
    differences: Tensor  # (steps, blocks, q) fp32; NaN where the step was skipped
    rates: Tensor  # (steps, groups, 2) fp32: learning rate and perturbation

    def __len__(self) -> int:
        return self.differences.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers (without the configuration)."""
        return 4 * (self.differences.numel() + self.rates.numel())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, in place of an older one only when it is whole."""
        metadata = {"format": _FORMAT, "config": json.dumps(self.config)}
        with replacing(Path(path)) as beside:
            save_file({"differences": self.differences, "rates": self.rates}, beside, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> SeedLog:
        """Read what `save` wrote. Raises WeftError for a file that is missing, damaged, or of another kind."""
        try:
            metadata, tensors = read_metadata(path), read_tensors(path)
        except (OSError, SafetensorError) as error:
            raise WeftError(f"The log {path} cannot be read ({error}).") from error
        if metadata.get("format") != _FORMAT:
            raise WeftError(f"{path} is not a log of zeroth-order steps; give the file that SeedLog.save wrote.")
        return cls(json.loads(metadata["config"]), tensors["differences"], tensors["rates"])

    @classmethod
    def of_rows(cls, config: dict[str, Any], rows: list[tuple[Tensor, Tensor]], blocks: int, groups: int) -> SeedLog:
        """From one (differences (blocks, q), rates (groups, 2)) a step."""
        empty = torch.empty(0, blocks, config["estimator"]["samples"]), torch.empty(0, groups, 2)
        differences, rates = (torch.stack(column) for column in zip(*rows, strict=True)) if rows else empty
        return cls(config, differences, rates)
