"""Checkpoint: the tensors of a model directory's safetensors files, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.errors import WeftError
from weft.tensors import read_tensor

__all__ = ["Checkpoint"]


class Checkpoint(Mapping[str, Tensor]):
    """name -> tensor, on the CPU in its stored dtype and in memory of its own.

    Args:
        directory: of a model, or of anything else in safetensors files.

    Raises:
        WeftError: there are no such files, or one is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise WeftError(f"There are no safetensors files in {directory}; give the directory of a checkpoint.")
        self._files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise WeftError(f"The weight file {file} is damaged or cut short ({error}); fetch it again.") from error

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
